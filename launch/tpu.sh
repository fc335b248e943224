#!/usr/bin/env bash
# A TPU slice from Google Cloud (TPU VM, queued resources): make it, set it up, train on all its hosts. ./launch/tpu.sh --help
# shellcheck source=_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

project=${CLOUDSDK_CORE_PROJECT:-} zone=${CLOUDSDK_COMPUTE_ZONE:-} type=v5litepod-16 version="" reservation="" spot="" reserved=""
worker="" lines=50 grace=300

usage() {
  cat <<END
./launch/tpu.sh create|setup|train|logs|status|stop|delete --name=NAME [flags]

  create    asks for the slice; it waits in Google's queue until status says ACTIVE
  setup     sends this project's last commit to every host and installs it there (3 minutes; again after each change)
  train     starts training on every host, detached: a lost connection does not end it. Needs --config= and --workdir=
  logs      shows the last lines of a host's log and follows it until the run ends; Ctrl-C ends only the looking
  status    the state of the slice, and of the run on each host
  stop      SIGTERM to every host's run: its state is saved, and the same train command goes on from there
  delete    gives the slice back

  --name=NAME             of the slice
  --project=ID            default \$CLOUDSDK_CORE_PROJECT: ${project:-not set}
  --zone=ZONE             default \$CLOUDSDK_COMPUTE_ZONE: ${zone:-not set}
  --type=TYPE             v5litepod-N, v6e-N (N chips), v5p-N, v4-N, v3-N, v2-N (N cores, two a chip). Default $type
  --version=RUNTIME       default: the one for that type of TPU (v2-alpha-tpuv5-lite, v2-alpha-tpuv6e, v2-alpha-tpuv5, tpu-ubuntu2204-base)
  --spot                  create: cheap, may be taken away; then delete, create, setup, train: it goes on from the last checkpoint
  --reserved              create: from your project's reservation; --reservation=NAME: from that one
  --workdir=gs://B/DIR    train: where state and figures go
  --config=FILE[:PRESET]  train: what to train, and --config.a.b=VALUE for its keys
  --worker=N|all          logs: whose (default 0); setup, train, status, stop: default all
  --lines=N               logs: how many lines back. Default $lines
  --grace=SECONDS         stop: how long to wait for the state to be saved. Default $grace
  --uncommitted           setup: send changes that are not committed too
  --dry_run               print the commands, run nothing
  -- FLAGS                create: more flags of gcloud compute tpus queued-resources create, e.g. -- --network=mtu9k --internal-ips

Before the first time: gcloud auth login; ssh-add ~/.ssh/google_compute_engine (for more than one host).
END
}

# Cores or chips in a type's name -> hosts. Single-host v5e and v6e have up to 8 chips, larger slices 4 a host; v2 to v4 and v5p count 8 cores a host.
hosts_of() { # hosts_of TYPE
  local family=${1%-*} size=${1##*-}
  [[ $1 =~ ^[a-z0-9]+-[1-9][0-9]{0,4}$ ]] || die "--type=$(quoted "$1") is no TPU type, e.g. v5litepod-256, v5p-128, v6e-256"
  case $family in
    v5litepod | v6e) if ((size <= 8)); then echo 1; else echo $((size / 4)); fi ;;
    v2 | v3 | v4 | v5p) echo $(((size + 7) / 8)) ;;
    *) die "--type=$1 is not known; types are v5litepod-N, v6e-N, v5p-N, v4-N, v3-N, v2-N (tpu7x: ./launch/gke.sh)" ;;
  esac
}

run_on() { # run_on HOSTS COMMAND
  run gcloud compute tpus tpu-vm ssh "$name" --project="$project" --zone="$zone" --worker="$1" --command="$2"
}

create() {
  local gcloud=(gcloud compute) capacity=() count=0
  hosts_of "$type" >/dev/null
  if [[ -z $version ]]; then
    case ${type%-*} in
      v5litepod) version=v2-alpha-tpuv5-lite ;;
      v5p) version=v2-alpha-tpuv5 ;;
      v6e) version=v2-alpha-tpuv6e ;;
      *) version=tpu-ubuntu2204-base ;;
    esac
  fi
  if [[ -n $spot ]]; then capacity+=(--spot) count=$((count + 1)); fi
  if [[ -n $reserved ]]; then capacity+=(--reserved) count=$((count + 1)); fi
  # Only the alpha form of the command takes a reservation by name.
  if [[ -n $reservation ]]; then gcloud=(gcloud alpha compute) capacity+=(--reservation="$reservation") count=$((count + 1)); fi
  ((count <= 1)) || die "--spot, --reserved and --reservation= exclude each other; give one"
  run "${gcloud[@]}" tpus queued-resources create "$name" --node-id="$name" --project="$project" --zone="$zone" \
    --accelerator-type="$type" --runtime-version="$version" ${capacity[@]+"${capacity[@]}"} ${handed_on[@]+"${handed_on[@]}"}
  if [[ -z $dry_run ]]; then say "asked for; when ./launch/tpu.sh status says ACTIVE: ./launch/tpu.sh setup"; fi
}

setup() {
  local commit file=$root/build/launch/$name.tar.gz
  choose_commit
  run mkdir -p "$root/build/launch"
  run git -C "$root" archive --format=tar.gz --output="$file" "$commit"
  run gcloud compute tpus tpu-vm scp "$file" "$name:rec_jax.tar.gz" --project="$project" --zone="$zone" --worker="${worker:-all}"
  run_on "${worker:-all}" \
    "rm -rf rec_jax.new && mkdir rec_jax.new && tar -xzf rec_jax.tar.gz -C rec_jax.new && EXTRAS=tpu ./rec_jax.new/launch/worker.sh install"
}

train() {
  local hosts
  hosts=$(hosts_of "$type")
  check_train
  if ((hosts > 1)); then check_bucket "it lies on one host, and --type=$type has $hosts"; fi
  run_on "${worker:-all}" "JAX_PLATFORMS=tpu,cpu ./rec_jax/launch/worker.sh start $(quoted "${train_flags[@]}" --workdir="$workdir")"
  if [[ -z $dry_run ]]; then say "training; ./launch/tpu.sh logs shows how it goes"; fi
}

logs() {
  check_number lines "$lines"
  run_on "${worker:-0}" "./rec_jax/launch/worker.sh logs $lines"
}

status() {
  local ask=(gcloud compute tpus queued-resources describe "$name" --project="$project" --zone="$zone" --format='value(state.state)') state=ACTIVE
  if [[ -n $dry_run ]]; then
    quoted "${ask[@]}"
  else
    state=$("${ask[@]}")
    say "$name is $state"
  fi
  if [[ $state == ACTIVE ]]; then run_on "${worker:-all}" "./rec_jax/launch/worker.sh status"; fi
}

stop() {
  check_number grace "$grace"
  run_on "${worker:-all}" "./rec_jax/launch/worker.sh stop $grace"
}

delete() {
  # --force: with its TPU VM. gcloud asks before it deletes.
  run gcloud compute tpus queued-resources delete "$name" --project="$project" --zone="$zone" --force
}

main() {
  local command=${1:---help}
  case $command in
    --help | -h) usage && exit 0 ;;
    create | setup | train | logs | status | stop | delete) shift ;;
    *) die "$(quoted "$command") is no command; commands are create, setup, train, logs, status, stop, delete; see ./launch/tpu.sh --help" ;;
  esac
  parse_flags "project zone type version reservation worker lines grace" "spot reserved" "$@"
  if ((${#handed_on[@]})) && [[ $command != create ]]; then die "flags after -- go with create only, not with $command"; fi
  if ((${#train_flags[@]})) && [[ $command != train ]]; then die "${train_flags[0]} goes with train, not with $command"; fi
  check_name name "$name"
  check_place "$project" "$zone"
  if [[ -n $worker && ! $worker =~ ^(all|[0-9]+)$ ]]; then die "--worker=$(quoted "$worker") is neither a number nor all"; fi
  if [[ -z $dry_run ]]; then
    command -v gcloud >/dev/null || die "gcloud is not installed; see cloud.google.com/sdk/docs/install, or look at the commands with --dry_run"
  fi
  "$command"
}

main "$@"
