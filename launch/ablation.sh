#!/usr/bin/env bash
# What each stage of a chain adds: runs a config that has the four stages whole and with each of them left out, for each seed, then compares
# them over users (paired bootstrap). Variants share the stages by which they begin. What is done is not done again.
#
#   ./launch/ablation.sh --config=configs/movielens.py --workdir=runs/ablation --seeds=0,1,2 [more train flags]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
config="" workdir="" seeds=0 flags=()
for word in "$@"; do
  case $word in
    --config=*) config=${word#*=} ;;
    --workdir=*) workdir=${word#*=} ;;
    --seeds=*) seeds=${word#*=} ;;
    -h | --help) sed -n '2,5p' "$0"; exit 0 ;;
    *) flags+=("$word") ;;
  esac
done
if [[ -z $config || -z $workdir ]]; then
  echo "[ablation] --config=FILE and --workdir=DIR are needed; --help says more" >&2
  exit 2
fi

python=$root/.venv/bin/python
variants=(no_pretrain no_contrastive no_task no_teacher alone)
IFS=, read -ra numbers <<<"$seeds"
shared() { # the stages that a variant has in common with the whole, from the first on
  case $1 in
    no_contrastive) echo pretrain ;;
    no_task) echo pretrain contrastive ;;
    no_teacher) echo pretrain contrastive task ;;
  esac
}

folders() { # of a variant, all seeds, with commas between them
  local seed out=""
  for seed in "${numbers[@]}"; do out+=${out:+,}$workdir/$1-$seed; done
  echo "$out"
}

for seed in "${numbers[@]}"; do
  for variant in whole "${variants[@]}"; do
    folder=$workdir/$variant-$seed
    if [[ -f $folder/eval/test_users.npz ]]; then continue; fi
    echo "[ablation] $variant, seed $seed"
    for stage in $(shared "$variant"); do
      if [[ ! -d $folder/$stage ]]; then
        mkdir -p "$folder"
        cp -r "$workdir/whole-$seed/$stage" "$folder/$stage"
      fi
    done
    preset=${variant/#whole/}
    "$python" -m rec_jax.train --config="$config${preset:+:$preset}" --workdir="$folder" --config.seed="$seed" \
      --config.eval.baselines="()" --config.eval.fuse="" --config.eval.examples="()" "${flags[@]+"${flags[@]}"}"
  done
done

compare=(--a="whole=$(folders whole)")
for variant in "${variants[@]}"; do compare+=(--b="$variant=$(folders "$variant")"); done
"$python" -m rec_jax.eval.compare "${compare[@]}"
