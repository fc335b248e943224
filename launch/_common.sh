# shellcheck shell=bash
# What tpu.sh, gke.sh and slurm.sh share: flags, checks, and commands that are shown before they run. Sourced, never run.
# It runs in the bash 3.2 of a Mac too: no associative arrays, and no empty array is expanded bare.
# shellcheck disable=SC2034  # variables are those of the scripts that source this
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tool=$(basename "$0" .sh)

# Set by parse_flags, with the scripts' own flags.
dry_run="" name="" workdir="" uncommitted=""
train_flags=() # --config=... and --config.a.b=...
handed_on=()   # what stands after --

say() { echo "[$tool] $*" >&2; }
die() {
  echo "[$tool] error: $*" >&2
  exit 1
}

# Prints its arguments as one line that a shell reads back as the same arguments; a flag's value is quoted, not its name.
quoted() {
  local word space="" head
  for word in "$@"; do
    head=""
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      if [[ $word =~ ^(--[A-Za-z0-9_.-]+=)(.*)$ ]]; then head=${BASH_REMATCH[1]} word=${word#*=}; fi
      word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'"
    fi
    printf '%s' "$space$head$word"
    space=" "
  done
  printf '\n'
}

# Runs a command after saying it; in a dry run prints it and no more.
run() {
  if [[ -n $dry_run ]]; then
    quoted "$@"
  else
    say "\$ $(quoted "$@")"
    "$@"
  fi
}

# parse_flags "FLAGS WITH A VALUE" "SWITCHES" ARGUMENTS...: sets the variables of those names, train_flags and handed_on.
parse_flags() {
  local values=" $1 name workdir " switches=" $2 dry_run uncommitted " word key
  shift 2
  while (($#)); do
    word=$1
    shift
    key=${word%%=*} key=${key#--}
    case $word in
      --help | -h) usage && exit 0 ;;
      --)
        handed_on=("$@")
        return
        ;;
      --config=?* | --config.?*=*) train_flags+=("$word") ;;
      --*=*)
        [[ $values == *" $key "* ]] || die "there is no flag --$key=; flags with a value are $(list "$values")--config=, --config.a.b="
        [[ -n ${word#*=} ]] || die "--$key= has no value"
        printf -v "$key" %s "${word#*=}"
        ;;
      --*)
        if [[ $values == *" $key "* || $key == config* ]]; then die "--$key has no value; write --$key=VALUE"; fi
        [[ $switches == *" $key "* ]] || die "there is no flag --$key; flags are $(list "$values")and without a value $(list "$switches" "")"
        printf -v "$key" %s 1
        ;;
      *) die "$(quoted "$word") is no flag; write --flag=VALUE; see ./launch/$tool.sh --help" ;;
    esac
  done
}

# "a b" -> "--a=, --b=, "
list() {
  local word
  for word in $1; do printf -- '--%s%s, ' "$word" "${2-=}"; done
}

need() { # need FLAG VALUE WHAT
  [[ -n $2 ]] || die "--$1= is needed: $3"
}

# Names of TPUs, workloads and jobs end up in host names.
check_name() { # check_name FLAG VALUE
  need "$1" "$2" "a name of your choice, e.g. --$1=bert-base"
  [[ $2 =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "--$1=$(quoted "$2") is no name: a small letter, then small letters, digits and dashes, at most 40, no dash at the end, e.g. bert-base"
}

check_number() { # check_number FLAG VALUE [LEAST]
  if [[ ! $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || (($2 < ${3:-1})); then die "--$1=$(quoted "$2") is no whole number of at least ${3:-1}"; fi
}

# Project and zone: gcloud's own environment variables are the defaults.
check_place() { # check_place PROJECT ZONE
  need project "$1" "the Google Cloud project; or export CLOUDSDK_CORE_PROJECT=PROJECT"
  [[ $1 =~ ^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$ ]] || die "--project=$(quoted "$1") is no project ID, e.g. my-project-123 (not its title, not its number)"
  need zone "$2" "where the TPU is, e.g. --zone=us-west4-a; or export CLOUDSDK_COMPUTE_ZONE=ZONE"
  [[ $2 =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone=$(quoted "$2") is no zone, e.g. us-west4-a (a region and a letter)"
}

# What to train is a file of this project, since each host reads its own copy of it.
check_train() {
  local word file=""
  for word in ${train_flags[@]+"${train_flags[@]}"}; do
    if [[ $word == --config=* ]]; then file=${word#--config=} file=${file%%:*}; fi
  done
  [[ -n $file ]] || die "--config= is needed: what to train, e.g. --config=configs/movielens.py"
  [[ $file != /* && -f $root/$file ]] || die "--config=$(quoted "$file") is no file of this project; give its path from $root, e.g. --config=configs/movielens.py"
  need workdir "$workdir" "where state and figures go, and from where the same command goes on, e.g. --workdir=gs://BUCKET/NAME"
}

check_bucket() { # check_bucket REASON
  [[ $workdir =~ ^gs://[a-z0-9][a-z0-9._-]+/. ]] || die "--workdir=$(quoted "$workdir") is no place for this: $1; give a folder of a bucket: --workdir=gs://BUCKET/NAME"
}

# Sets commit: what is sent to other hosts. Those run what a commit holds, so that a run can be made again.
choose_commit() {
  commit=$(git -C "$root" rev-parse --short=12 --verify --quiet HEAD) ||
    die "$root is no git checkout with a commit, and a commit is what is sent; run git init && git add -A && git commit -m begin"
  [[ -n $(git -C "$root" status --porcelain --untracked-files=no) ]] || return 0
  if [[ -n $uncommitted ]]; then
    commit=$(git -C "$root" stash create "launch: not committed")
  elif [[ -n $dry_run ]]; then
    say "note: there are changes that are not committed; without --uncommitted this will be refused"
  else
    die "there are changes that are not committed: commit them, or send them as they are with --uncommitted (new files need git add)"
  fi
}
