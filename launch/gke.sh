#!/usr/bin/env bash
# TPU slices in a Google Kubernetes Engine cluster, through xpk: make the cluster, train, follow the log. ./launch/gke.sh --help
# shellcheck source=_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

project=${CLOUDSDK_CORE_PROJECT:-} zone=${CLOUDSDK_COMPUTE_ZONE:-} type=v5litepod-16 cluster="" slices=1 reservation="" spot="" flex=""
image=python:3.11 priority=medium restarts=10 worker=0 lines=50 grace=300

usage() {
  cat <<END
./launch/gke.sh create|train|logs|status|stop|delete --cluster=CLUSTER [--name=NAME] [flags]

  create    makes a cluster with its TPU slices (20 minutes), or changes the number of its slices
  train     sends this project's last commit as an image and starts training on every host of the slices. Needs --config= and --workdir=
  logs      shows the last lines of a host's log and follows it; Ctrl-C ends only the looking
  status    the runs in the cluster
  stop      SIGTERM to every host's run: its state is saved, the run leaves the cluster, and the same train command goes on from there
  delete    deletes the cluster, with everything that runs in it

  --cluster=CLUSTER       of xpk
  --name=NAME             of the run; not for create and delete
  --project=ID            default \$CLOUDSDK_CORE_PROJECT: ${project:-not set}
  --zone=ZONE             default \$CLOUDSDK_COMPUTE_ZONE: ${zone:-not set}
  --type=TYPE             of a slice: v5litepod-N, v6e-N (N chips), v5p-N, v4-N (N cores, two a chip), or any other of xpk. Default $type
  --slices=N              create: how many to have; train: how many to use, as one run. Default $slices
  --spot                  create: cheap, may be taken away; --flex: queued; --reservation=NAME: from that one. Default: on demand
  --workdir=gs://B/DIR    train: where state and figures go
  --config=FILE[:PRESET]  train: what to train, and --config.a.b=VALUE for its keys
  --image=IMAGE           train: what the project is laid upon and set up in, 2 minutes at each start. Default $image
  --restarts=N            train: how often a run that a failure or a preemption ended is started again, from its last checkpoint. Default $restarts
  --priority=LEVEL        train: very-low, low, medium, high, very-high. Default $priority
  --grace=SECONDS         train: how long a stop waits for the state to be saved. Default $grace
  --worker=N|all          logs: whose. Default $worker
  --lines=N               logs: how many lines back. Default $lines
  --uncommitted           train: send changes that are not committed too
  --dry_run               print the commands, run nothing
  -- FLAGS                create, train: more flags of xpk cluster create, xpk workload create

Before the first time: pip install xpk (in an environment of its own); gcloud auth login; gcloud auth configure-docker.
END
}

# run_xpk WHAT WHICH FLAGS...
run_xpk() {
  local what=$1 which=$2
  shift 2
  run xpk "$what" "$which" --cluster="$cluster" --project="$project" --zone="$zone" "$@"
}

create() {
  local capacity=() count=0
  check_number slices "$slices"
  if [[ -n $spot ]]; then capacity+=(--spot) count=$((count + 1)); fi
  if [[ -n $flex ]]; then capacity+=(--flex) count=$((count + 1)); fi
  if [[ -n $reservation ]]; then capacity+=(--reservation="$reservation") count=$((count + 1)); fi
  ((count <= 1)) || die "--spot, --flex and --reservation= exclude each other; give one"
  if ((count == 0)); then capacity=(--on-demand); fi
  run_xpk cluster create --tpu-type="$type" --num-slices="$slices" "${capacity[@]}" ${handed_on[@]+"${handed_on[@]}"}
}

train() {
  local commit folder=$root/build/launch/$name
  check_number slices "$slices"
  check_number restarts "$restarts" 0
  check_number grace "$grace"
  [[ $priority =~ ^(very-low|low|medium|high|very-high)$ ]] || die "--priority=$(quoted "$priority") is none of very-low, low, medium, high, very-high"
  check_train
  check_bucket "a host's own disk goes with the run"
  choose_commit
  run rm -rf "$folder"
  run mkdir -p "$folder"
  run git -C "$root" archive --format=tar --output="$folder.tar" "$commit"
  run tar -xf "$folder.tar" -C "$folder"
  # exec: xpk hands SIGTERM to this command's shell, which must have become the training by then.
  run_xpk workload create --workload="$name" --tpu-type="$type" --num-slices="$slices" --priority="$priority" \
    --base-docker-image="$image" --script-dir="$folder" --max-restarts="$restarts" --termination-grace-period-seconds="$grace" \
    --env=JAX_PLATFORMS=tpu,cpu ${handed_on[@]+"${handed_on[@]}"} \
    --command="EXTRAS=tpu ./launch/setup.sh && exec .venv/bin/python -u -m rec_jax.train $(quoted "${train_flags[@]}" --workdir="$workdir")"
}

logs() {
  local pods=jobset.sigs.k8s.io/jobset-name=$name
  check_number lines "$lines"
  if [[ $worker != all ]]; then pods+=,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=$worker; fi
  run gcloud container clusters get-credentials "$cluster" --project="$project" --region="${zone%-*}"
  run kubectl logs --follow --prefix --tail="$lines" --max-log-requests=1000 --selector="$pods" --all-containers
}

status() { run_xpk workload list --filter-by-job="$name"; }

stop() { run_xpk workload delete --workload="$name" --force; }

# xpk asks before it deletes.
delete() { run_xpk cluster delete; }

main() {
  local command=${1:---help} tools="xpk" missing
  case $command in
    --help | -h) usage && exit 0 ;;
    create | train | logs | status | stop | delete) shift ;;
    *) die "$(quoted "$command") is no command; commands are create, train, logs, status, stop, delete; see ./launch/gke.sh --help" ;;
  esac
  parse_flags "project zone type cluster slices reservation image priority restarts worker lines grace" "spot flex" "$@"
  if ((${#handed_on[@]})) && [[ $command != create && $command != train ]]; then die "flags after -- go with create and train, not with $command"; fi
  if ((${#train_flags[@]})) && [[ $command != train ]]; then die "${train_flags[0]} goes with train, not with $command"; fi
  check_name cluster "$cluster"
  if [[ $command == create || $command == delete ]]; then
    [[ -z $name ]] || die "--name= is a run's; $command takes --cluster= only"
  else
    check_name name "$name"
  fi
  check_place "$project" "$zone"
  [[ $type =~ ^[a-z0-9]+-[0-9x]+$ ]] || die "--type=$(quoted "$type") is no TPU type, e.g. v5litepod-256, v5p-128, tpu7x-4x4x4"
  [[ $worker =~ ^(all|[0-9]+)$ ]] || die "--worker=$(quoted "$worker") is neither a number nor all"
  if [[ -z $dry_run ]]; then
    if [[ $command == logs ]]; then tools="gcloud kubectl"; fi
    for missing in $tools; do
      command -v "$missing" >/dev/null || die "$missing is not installed (./launch/gke.sh --help, last line); look at the commands with --dry_run"
    done
  fi
  "$command"
}

main "$@"
