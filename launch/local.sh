#!/usr/bin/env bash
# Sets up .venv if needed, then runs the main job: MovieLens latest-small (embedded) through a pretrained BERT in four stages, 7 to 9 minutes on 2 cores.
#
#   ./launch/local.sh [more train flags]     e.g. --config.train.duration="2 epochs" --workdir=/tmp/w; a flag given here wins
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/setup.sh"

# Paths among the flags are relative to where you are; the defaults are this project's.
here=""
if [[ $PWD != "$root" ]]; then here=$root/; fi
echo "[local] the main job: 7 to 9 minutes on 2 cores; each part says how long it is expected to take"
# Large arrays in large pages: a step of the encoder took .85 x the time (tests/bench/text_step.py). Nothing where the C library knows no such key.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec "$root/.venv/bin/python" -m rec_jax.train --config="${here}configs/movielens.py" --workdir="${here}runs/movielens" "$@"
