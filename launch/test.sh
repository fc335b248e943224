#!/usr/bin/env bash
# Sets up .venv if needed, then lint, format, types, shell scripts, and the tests. What .ci/run and the workflow call.
#
#   ./launch/test.sh [pytest flags]          e.g. -k losses, -x, -m slow, tests/config_test.py
#   REC_JAX_DATA=DIR ./launch/test.sh        also the tests that read real data sets, kept in DIR
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

failed=()
step() {
  local name=$1
  shift
  echo "[test] $name"
  "$@" || failed+=("$name")
}
step "ruff check" ruff check --quiet
step "ruff format" ruff format --check --quiet
step "mypy" mypy
step "shellcheck" shellcheck launch/*.sh .ci/run

echo "[test] pytest"
status=0
# Two processes: a test mostly keeps one core busy, eight simulated devices or not.
python -m pytest -n 2 --dist worksteal "$@" || status=$?
if ((${#failed[@]})); then
  echo "[test] failed before the tests: ${failed[*]}" >&2
  exit 1
fi
exit "$status"
