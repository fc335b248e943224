#!/usr/bin/env bash
# GPU hosts of a SLURM cluster: submit a training, follow its log, stop it. ./launch/slurm.sh --help
# shellcheck source=_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

nodes=1 gpus=8 tasks=host cpus="" time=24:00:00 partition="" account="" lines=50 grace=300

usage() {
  cat <<END
./launch/slurm.sh submit|logs|status|stop --name=NAME [flags]

  submit    sets up .venv with the extra gpu if needed, then submits a job that trains. Needs --config= and --workdir=
  logs      shows the last lines of the job's log and follows it; Ctrl-C ends only the looking
  status    the job in the queue
  stop      SIGTERM to every process: its state is saved, and the same submit goes on from there; a job that waits is taken back

  --name=NAME             of the job
  --workdir=DIR           submit: where state and figures go: a folder that all hosts see, or gs://BUCKET/DIR
  --config=FILE[:PRESET]  submit: what to train, and --config.a.b=VALUE for its keys
  --nodes=N               hosts. Default $nodes
  --gpus=N                GPUs of a host. Default $gpus
  --tasks=host|gpu        processes: one a host with all of its GPUs, or one a GPU. Default $tasks
  --cpus=N                cores of a process. Default: 8 a GPU
  --time=LIMIT            as sbatch has it. Default $time. --grace=SECONDS before it the state is saved, and the same submit goes on. Default $grace
  --partition=, --account=  as sbatch has them. Default: the cluster's
  --lines=N               logs: how many lines back. Default $lines
  --dry_run               print the commands, run nothing
  -- FLAGS                submit: more flags of sbatch, e.g. -- --constraint=h100 --mail-type=END

This folder must be on a file system that all hosts see. The log is runs/slurm/NAME.log.
END
}

submit() {
  local per_node cpus_of_task devices="" place=() log=$root/runs/slurm/$name.log
  check_number nodes "$nodes"
  check_number gpus "$gpus"
  check_number grace "$grace"
  [[ $time =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || die "--time=$(quoted "$time") is no time limit of sbatch, e.g. 24:00:00, 2-12, 90 (minutes)"
  check_train
  case $workdir in
    /tmp/* | /var/tmp/* | /dev/shm/*)
      ((nodes == 1)) || die "--workdir=$workdir lies on one host, but --nodes=$nodes; give a folder that all of them see, or gs://BUCKET/NAME"
      ;;
  esac
  case $tasks in
    # Under SLURM jax gives each process one GPU, the one of its number on the host, unless it is told which.
    host) per_node=1 cpus_of_task=${cpus:-$((8 * gpus))} devices=" JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((gpus - 1)))" ;;
    gpu) per_node=$gpus cpus_of_task=${cpus:-8} ;;
    *) die "--tasks=$(quoted "$tasks") is neither host nor gpu" ;;
  esac
  check_number cpus "$cpus_of_task"
  if [[ -n $partition ]]; then place+=(--partition="$partition"); fi
  if [[ -n $account ]]; then place+=(--account="$account"); fi
  run env EXTRAS=gpu "$root/launch/setup.sh"
  run mkdir -p "$root/runs/slurm"
  # --gpu-bind=none: every process sees all GPUs of its host, and jax takes its own. TERM goes to the processes, not to the batch script.
  run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$per_node" --gpus-per-node="$gpus" --cpus-per-task="$cpus_of_task" \
    --time="$time" ${place[@]+"${place[@]}"} --signal="TERM@$grace" --requeue --open-mode=append --output="$log" --chdir="$root" \
    ${handed_on[@]+"${handed_on[@]}"} \
    --wrap="exec srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task=$cpus_of_task env JAX_PLATFORMS=cuda,cpu$devices .venv/bin/python -u -m rec_jax.train $(quoted "${train_flags[@]}" --workdir="$workdir")"
}

logs() {
  check_number lines "$lines"
  run tail -n "$lines" -F "$root/runs/slurm/$name.log"
}

status() { run squeue --name="$name" --user="$USER"; }

stop() {
  run scancel --name="$name" --user="$USER" --state=PENDING
  run scancel --name="$name" --user="$USER" --state=RUNNING --signal=TERM
}

main() {
  local command=${1:---help}
  case $command in
    --help | -h) usage && exit 0 ;;
    submit | logs | status | stop) shift ;;
    *) die "$(quoted "$command") is no command; commands are submit, logs, status, stop; see ./launch/slurm.sh --help" ;;
  esac
  parse_flags "nodes gpus tasks cpus time partition account lines grace" "" "$@"
  [[ -z $uncommitted ]] || die "there is no flag --uncommitted: the job runs this folder as it is"
  if ((${#handed_on[@]})) && [[ $command != submit ]]; then die "flags after -- go with submit only, not with $command"; fi
  if ((${#train_flags[@]})) && [[ $command != submit ]]; then die "${train_flags[0]} goes with submit, not with $command"; fi
  check_name name "$name"
  USER=${USER:-$(id -un)}
  if [[ -z $dry_run && $command != logs ]]; then
    command -v sbatch >/dev/null || die "sbatch is not installed: run this on a login host of the cluster, or look at the commands with --dry_run"
  fi
  "$command"
}

main "$@"
