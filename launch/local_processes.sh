#!/usr/bin/env bash
# Trains with several processes on this machine, joined by jax.distributed as the hosts of a pod are: to try what differs there.
#
#   ./launch/local_processes.sh N [--devices_per_process=D] --config=... --workdir=... [more train flags]
#   ./launch/local_processes.sh N [--devices_per_process=D] -- COMMAND...      any command that calls rec_jax.processes.start()
#
#   ./launch/local_processes.sh 2 --devices_per_process=4 --config=configs/movielens.py:smoke --workdir=runs/two
#
# Process 0 writes to the screen; the others to process-N.log in the workdir (for a gs:// workdir or a command of your own: in a temporary
# folder, which is named). If one ends with an error, its last lines are shown as [pN] and the others are stopped. Ctrl-C and SIGTERM reach all:
# their state is saved, and the same command goes on from there; a second Ctrl-C ends them at once.
# D: simulated CPU devices of each. With JAX_PLATFORMS=cuda each process takes one GPU instead.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { echo "[local_processes] $*" >&2; }
die() {
  say "error: $*"
  exit 2
}

pids=()
logs=()
asked="" # the signal that was received

# Sets command, count, and folder.
parse() {
  local word devices="" xla_flags=""
  count=${1:-}
  if [[ $count == --help || $count == -h ]]; then
    sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
  fi
  if [[ ! $count =~ ^[1-9][0-9]{0,2}$ ]]; then die "the first argument is the number of processes, 1 to 999, not '$count'; e.g. ./launch/local_processes.sh 2 --config=..."; fi
  shift
  if [[ ${1:-} == --devices_per_process=* ]]; then
    devices=${1#*=}
    [[ $devices =~ ^[1-9][0-9]{0,3}$ ]] || die "--devices_per_process=$devices is no number from 1 to 9999"
    shift
  fi
  folder=""
  if [[ ${1:-} == -- ]]; then
    shift
    (($#)) || die "there is no command after --"
    command=("$@")
  else
    for word in "$@"; do
      case $word in
        --devices_per_process*) die "$word must come first, right after the number of processes, as --devices_per_process=D" ;;
        --workdir=gs://* | --workdir=*://*) ;;
        --workdir=?*) folder=${word#--workdir=} ;;
      esac
    done
    [[ " $*" == *" --workdir"* ]] || die "--workdir= is needed: processes share it, e.g. --workdir=runs/two"
    [[ -x $root/.venv/bin/python ]] || "$root/launch/setup.sh"
    command=("$root/.venv/bin/python" -m rec_jax.train "$@")
  fi
  if [[ -n $devices ]]; then
    for word in ${XLA_FLAGS:-}; do
      if [[ $word != --xla_force_host_platform_device_count=* ]]; then xla_flags+="$word "; fi
    done
    export XLA_FLAGS=$xla_flags--xla_force_host_platform_device_count=$devices
  fi
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
}

free_port() {
  local port
  while true; do
    port=$((20000 + RANDOM % 12000)) # below the range from which systems take ports by themselves
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
}

# A group of its own for each process: Ctrl-C comes to this script alone, which hands it on.
start() {
  local i
  if [[ -n $folder ]]; then mkdir -p "$folder"; else folder=$(mktemp -d "${TMPDIR:-/tmp}/rec_jax_processes.XXXXXX"); fi
  JAX_COORDINATOR_ADDRESS=127.0.0.1:$(free_port)
  export JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES=$count JAX_PROCESS_ID
  set -m
  for ((i = 0; i < count; i++)); do
    JAX_PROCESS_ID=$i
    if [[ $JAX_PLATFORMS == cuda* ]]; then export JAX_LOCAL_DEVICE_IDS=$i; fi
    logs[i]=$folder/process-$i.log
    if ((i == 0)); then
      "${command[@]}" </dev/null &
    else
      "${command[@]}" </dev/null >"${logs[i]}" 2>&1 &
    fi
    pids[i]=$!
  done
  set +m
  if ((count > 1)); then say "$count processes at $JAX_COORDINATOR_ADDRESS; logs of 1 to $((count - 1)): $folder/process-N.log"; fi
}

# To the processes themselves: they know what to do with their children.
signal_all() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill "-$1" "$pid" 2>/dev/null || true; done
}

# With their children. Waiting for them keeps bash from reporting each.
kill_all() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill -KILL -- "-$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
}

any_runs() {
  local pid
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then return 0; fi
  done
  return 1
}

# Waits until all have ended, at most that many seconds; then ends what is left, children of the processes included.
wait_for_end() {
  local tenth
  for ((tenth = 0; tenth < $1 * 10; tenth++)); do
    any_runs || break
    sleep 0.1
  done
  if any_runs; then say "ending what still runs after $1 s"; fi
  kill_all
}

on_signal() {
  if [[ -n $asked ]]; then
    say "ending all at once"
    kill_all
    exit 130
  fi
  asked=$1
  say "stopping all $count processes; the same signal again ends them at once"
  signal_all "$1"
}

main() {
  local command count folder running i code
  parse "$@"
  trap 'on_signal INT' INT
  trap 'on_signal TERM' TERM
  trap 'on_signal TERM' HUP
  trap kill_all EXIT # whatever ends this script ends the processes
  start
  if [[ -n $asked ]]; then signal_all "$asked"; fi # it came while they were being started
  running=$count
  while ((running)); do
    sleep 0.1
    if [[ -n $asked ]]; then
      wait_for_end "${REC_JAX_GRACE_SECONDS:-300}"
      if [[ $asked == INT ]]; then exit 130; else exit 143; fi
    fi
    for ((i = 0; i < count; i++)); do
      if [[ -z ${pids[i]+set} ]] || kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
      code=0
      wait "${pids[i]}" 2>/dev/null || code=$?
      if ((code)) && [[ -z $asked ]]; then
        say "process $i ended with code $code; stopping the others"
        signal_all TERM
        wait_for_end 5
        if ((i)); then tail -n 20 "${logs[i]}" | sed "s/^/[p$i] /" >&2; fi
        exit "$code"
      fi
      unset "pids[i]"
      running=$((running - 1))
      ((running)) || exit 0
    done
  done
}

main "$@"
