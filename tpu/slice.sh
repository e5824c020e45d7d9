# shellcheck shell=bash disable=SC2034  # set here, used where it is sourced
# What the scripts know of slices: sizes, names, states, and how to reach their workers. Sourced after arguments.sh.

# The slice or one of its workers is gone, or cannot be seen: trying again mends it. So does a process end that lost
# another.
LOST=76

# A worker holds 4 chips; v5e and v6e up to 2x4 are one worker.
declare -A TOPOLOGIES=(
  [v4]="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
  [v5e]="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
  [v5p]="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24"
  [v6e]="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
)
declare -A PREFIX=([v4]=v4 [v5e]=v5litepod [v5p]=v5p [v6e]=v6e) # of gcloud's names
declare -A UNITS=([v4]=2 [v5e]=1 [v5p]=2 [v6e]=1)                 # they count cores, of which a chip has so many
declare -A RUNTIME=([v4]=tpu-ubuntu2204-base [v5e]=v2-alpha-tpuv5-lite [v5p]=v2-alpha-tpuv5 [v6e]=v2-alpha-tpuv6e)

# Sets generation, topology, accelerator (gcloud's name), chips and workers of a slice, given as v5p:4x4x4 or v5p-128.
resolve() {
  for generation in v4 v5e v5p v6e; do
    for topology in ${TOPOLOGIES[$generation]}; do
      chips=$((${topology//x/*}))
      accelerator=${PREFIX[$generation]}-$((chips * UNITS[$generation]))
      workers=$(((chips + 3) / 4))
      [[ $generation == v[56]e && $chips -le 8 ]] && workers=1
      [[ $1 != "$accelerator" && $1 != "$generation:$topology" ]] || return 0
    done
  done
  return 1
}

need_accelerator() {
  need accelerator
  resolve "${flag[accelerator]}" ||
    refuse "--accelerator=${flag[accelerator]} is no slice; there are $(sizes_like "${flag[accelerator]}")"
}

# The sizes of the generation that is meant, or of all.
sizes_like() {
  local generation topology line="" given=${1/v5litepod/v5e}
  for generation in v4 v5e v5p v6e; do
    [[ -n ${TOPOLOGIES[${given%%[:-]*}]:-} && ${given%%[:-]*} != "$generation" ]] && continue
    for topology in ${TOPOLOGIES[$generation]}; do
      line+=", $generation:$topology (${PREFIX[$generation]}-$((${topology//x/*} * UNITS[$generation])))"
    done
  done
  echo "${line#, }"
}

# tpus VERB ...: a verb of the slice's queued resource.
tpus() {
  local where=(--zone="${flag[zone]}" --quiet)
  [[ -z ${flag[project]:-} ]] || where+=(--project="${flag[project]}")
  gcloud_call compute tpus queued-resources "$@" "${where[@]}"
}

gcloud_call() { call gcloud "$@" </dev/null; }

describe() {
  local fields="state.state,tpu.nodeSpec[0].node.acceleratorType,tpu.nodeSpec.len()"
  tpus describe "${flag[name]}" --format="value($fields)"
}

# Sets state (NONE: there is no such slice, UNKNOWN: gcloud cannot tell), and of a slice its accelerator and slices.
look() {
  local answer errors
  errors=$(mktemp)
  if answer=$(describe 2>"$errors"); then
    IFS=$'\t' read -r state accelerator slices <<<"$answer"
  elif grep -q NOT_FOUND "$errors"; then
    state=NONE
  else
    state=UNKNOWN
    cat "$errors" >&2
  fi
  rm -f "$errors"
}

# Sets workers_per_slice, and workers of all slices together; ends the script where there is nothing to run on.
need_active() {
  look
  case $state in
    ACTIVE) resolve "$accelerator" || refuse "${flag[name]} is a $accelerator, which is not known here" ;;
    *) say "${flag[name]} cannot be run on: its state is $state" && exit "$LOST" ;;
  esac
  workers_per_slice=$workers
  workers=$((workers * slices))
}

# on_workers COMMAND [NODE WORKER]: on all workers, or on one.
on_workers() { tpus ssh "${flag[name]}" --node="${2:-all}" --worker="${3:-all}" --command="$1"; }

# The results of a worker.sh action, one line a worker that answered. gcloud's own exit status does not say
# whether it reached them all: of a slice that is gone it runs the command on the rest, on none even, and is content.
answers() {
  on_workers "bash worker.sh $1" | sed -n 's/^ldm_jax //p' | sort -u || true
}
