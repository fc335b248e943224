#!/usr/bin/env bash
# One host's part of a training: install what was sent, start it detached, show its log, stop it. tpu.sh calls it on every TPU host; on a
# GPU host of your own it does the same by hand.
#
#   ./launch/worker.sh install             puts this copy of the project at ~/rec_jax, keeps its .venv, and sets it up; EXTRAS=tpu|gpu as setup.sh
#   ./launch/worker.sh start TRAIN_FLAGS   starts python -m rec_jax.train, which outlives this shell; says so if it dies within seconds
#   ./launch/worker.sh logs [LINES]        the log's last lines, and what follows until the run ends
#   ./launch/worker.sh status              runs or not, and the last line
#   ./launch/worker.sh stop [SECONDS]      SIGTERM; waits until the state is saved and the run has ended. Default 300
#
# Log and process number are kept in ~/rec_jax_run. On a TPU VM of several hosts (JAX_PLATFORMS=tpu...) start sets what joins them.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
home=$HOME/rec_jax
kept=$HOME/rec_jax_run
log=$kept/train.log
host=$(hostname)

say() { echo "[$host] $*"; }
die() {
  echo "[$host] error: $*" >&2
  exit 1
}

# Prints the run's process number if it runs. Numbers are used again, so the command counts too.
running() {
  local pid
  [[ -f $kept/pid ]] || return 1
  pid=$(<"$kept/pid")
  [[ $(ps -o args= -p "$pid" 2>/dev/null) == *rec_jax.train* ]] || return 1
  echo "$pid"
}

last_lines() { tail -n "$1" "$log" 2>/dev/null | sed "s/^/[$host] /"; }

# TPU VMs have Ubuntu 22.04 with Python 3.10: setup.sh needs a later one, which uv (pinned in requirements.lock) brings.
choose_python() {
  local candidate
  for candidate in ${PYTHON:-} "$home/.venv/bin/python" python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
      if [[ $candidate != "$home/.venv/bin/python" ]]; then export PYTHON=$candidate; fi
      return
    fi
  done
  say "no Python 3.11 to 3.13 here; getting 3.11"
  mkdir -p "$kept"
  awk '/^uv==/ { on = 1 } on { print } on && !/\\$/ { exit }' "$root/requirements.lock" >"$kept/uv.lock"
  python3 -m pip install --quiet --user --no-deps --require-hashes -r "$kept/uv.lock"
  "$HOME/.local/bin/uv" python install --quiet 3.11
  PYTHON=$("$HOME/.local/bin/uv" python find 3.11)
  export PYTHON
}

install() {
  local pid
  if pid=$(running); then die "process $pid is training; stop it first, then install"; fi
  if [[ $root != "$home" ]]; then
    mkdir -p "$home"
    find "$home" -mindepth 1 -maxdepth 1 ! -name '.venv*' ! -name runs -exec rm -rf {} +
    cp -R "$root/." "$home/"
  fi
  choose_python
  "$home/launch/setup.sh" | sed "s/^/[$host] /"
}

# An attribute of this TPU VM from Google's metadata server, as jax reads it.
metadata() {
  curl --silent --fail --max-time 20 --header 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1" ||
    die "this host's metadata has no $1: is it a TPU VM? Without TPU: JAX_PLATFORMS=cpu or cuda"
}

# What rec_jax.processes.start() asks for: a TPU VM's environment does not say by itself that there are more hosts.
join_hosts() {
  local endpoints first number
  [[ ${JAX_PLATFORMS:-} == tpu* && -z ${JAX_COORDINATOR_ADDRESS:-} ]] || return 0
  endpoints=$(metadata worker-network-endpoints) # "name:id:ip,name:id:ip" or "name,name", in order of the workers
  if [[ $endpoints != *,* ]]; then return; fi
  number=$(metadata agent-worker-number)
  first=${endpoints%%,*}
  export JAX_COORDINATOR_ADDRESS=${first##*:}:8482 JAX_PROCESS_ID=$number # 8482: the port that jax itself takes on TPU VMs
  JAX_NUM_PROCESSES=$(tr ',' '\n' <<<"$endpoints" | wc -l | tr -d ' ')
  export JAX_NUM_PROCESSES
}

start() {
  local pid tenth
  if pid=$(running); then die "process $pid is training already; logs shows it, stop ends it"; fi
  [[ -f $root/.venv/ready ]] || die "$root is not set up; from your machine: ./launch/tpu.sh setup; by hand: ./launch/setup.sh"
  join_hosts
  mkdir -p "$kept"
  cd "$root"
  echo "--- $(date -u '+%Y-%m-%d %H:%M:%S') UTC: python -m rec_jax.train $*" >>"$log"
  nohup setsid .venv/bin/python -u -m rec_jax.train "$@" </dev/null >>"$log" 2>&1 &
  pid=$!
  echo "$pid" >"$kept/pid"
  # Wrong flags and configs show within seconds, and are better seen now than in a log; tests wait less.
  for ((tenth = 0; tenth < ${REC_JAX_WATCH_SECONDS:-15} * 10; tenth++)); do
    if ! kill -0 "$pid" 2>/dev/null; then
      if wait "$pid"; then break; fi
      last_lines 15 >&2
      die "the run ended at once; above: the end of $log"
    fi
    sleep 0.1
  done
  say "process $pid${JAX_NUM_PROCESSES:+, host $JAX_PROCESS_ID of $JAX_NUM_PROCESSES}, log $log"
}

logs() {
  local pid
  [[ -f $log ]] || die "there is no log yet: nothing was started on this host"
  if pid=$(running); then
    tail -n "${1:-50}" -F --pid="$pid" "$log"
  else
    tail -n "${1:-50}" "$log"
    say "not running"
  fi
}

status() {
  local pid
  if pid=$(running); then say "process $pid is training"; else say "not running"; fi
  last_lines 1
}

stop() {
  local pid tenth
  if ! pid=$(running); then
    say "not running"
    return
  fi
  kill -TERM "$pid"
  for ((tenth = 0; tenth < ${1:-300} * 10; tenth++)); do
    if ! running >/dev/null; then
      last_lines 1
      say "stopped"
      return
    fi
    sleep 0.1
  done
  die "process $pid still runs ${1:-300} s after SIGTERM; wait longer (--grace=), or end it with kill -KILL $pid: then what came after the last checkpoint is lost"
}

main() {
  local command=${1:-}
  case $command in
    install | start | logs | status | stop) shift ;;
    *) die "commands are install, start, logs, status, stop" ;;
  esac
  "$command" "$@"
}

main "$@"
