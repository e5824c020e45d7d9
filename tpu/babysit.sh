#!/usr/bin/env bash
# Creates a slice, sets it up, runs the command on it, and does so again whenever the slice was preempted or the run
# lost a process, until the run is done. The run continues from its last checkpoint.
#
#   tpu/babysit.sh --name=NAME --zone=ZONE --accelerator=v5p:4x4x4 --spot \
#     -- python -m ldm_jax.train --config=... --workdir=gs://BUCKET/RUN --distributed
#
# Stopped and started again, it attaches. The code is that of --source at its start, through all restarts.
#
#   --name= --zone= --project= --poll= --dry-run                                as all scripts have them
#   --accelerator= --slices= --spot --reserved --runtime-version= --create-flag=  see tpu/create.sh --help
#   --source= --mount=                                                          see tpu/setup.sh --help
#   --logs=                                                                     see tpu/run.sh --help
#   --restarts=5  restarts in a row after which there is no new checkpoint; then it stops with the last status
#   --delete      delete the slice in the end, however that was
#
# Exit status: the command's 0, 1 or 2, which a restart does not mend, or the last one that it gave up on.

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/arguments.sh"

# The flags of those named that were given.
given() {
  local name
  for name; do
    case ${flag[$name]:-} in
      "") ;;
      "$ON") echo "--$name" ;;
      *) echo "--$name=${flag[$name]}" ;;
    esac
  done
}

workdir() {
  local word
  for word in "${command[@]}"; do
    [[ $word != --workdir=gs://* ]] || echo "${word#--workdir=}"
  done
}

# The newest whole checkpoint; their names are the examples seen, all of one length.
newest() {
  call gcloud storage ls "$bucket/checkpoints/*/commit_success.txt" 2>/dev/null </dev/null |
    sort | tail -n 1 || true
}

keep_source() {
  source=${flag[source]:-$here/..}
  [[ -d $source ]] || return 0
  mkdir -p "$logs"
  "$here/setup.sh" --source="$source" --pack="$logs/source.tar.gz"
  source=$logs/source.tar.gz
}

attempt() {
  "$here/create.sh" "${slice[@]}" "${create[@]}" &&
    "$here/setup.sh" "${slice[@]}" --source="$source" "${mount[@]}" &&
    "$here/run.sh" "${slice[@]}" --logs="$logs" "${poll[@]}" -- "${command[@]}"
}

# Ends with what the last attempt ended with.
persist() {
  local status before after in_vain=0
  before=$(newest)
  while :; do
    status=0
    attempt || status=$?
    case $status in 0 | 1 | 2 | 130) return "$status" ;; esac
    after=$(newest)
    in_vain=$((in_vain + 1))
    [[ $after == "$before" ]] || in_vain=0
    before=$after
    if ((in_vain > ${flag[restarts]:-5})); then
      say "ended with $status, and no new checkpoint since ${flag[restarts]:-5} restarts"
      return "$status"
    fi
    say "ended with $status; trying again, from ${after:-the beginning}"
    sleep "${flag[poll]:-30}"
  done
}

main() {
  local flags="name= zone= project= accelerator= slices= spot reserved runtime-version= create-flag="
  parse "$flags source= mount= logs= poll= restarts= delete dry-run --" "$@"
  need name zone accelerator
  check_flags
  ((${#command[@]})) || refuse "the command is missing: -- python -m ldm_jax.train ..."
  bucket=$(workdir)
  bucket=${bucket%/}
  [[ -n $bucket ]] ||
    refuse "the command has no --workdir=gs://BUCKET/RUN, and what is on a slice is lost with it"
  logs=${flag[logs]:-logs/${flag[name]}}
  mapfile -t slice < <(given name zone project dry-run)
  mapfile -t poll < <(given poll)
  mapfile -t mount < <(given mount)
  mapfile -t create < <(given accelerator slices spot reserved runtime-version poll)
  local more
  for more in "${create_flags[@]}"; do create+=("--create-flag=$more"); done
  if dry_run; then
    plan
    return
  fi
  keep_source
  local status=0
  persist || status=$?
  [[ -z ${flag[delete]:-} || $status == 130 ]] || "$here/delete.sh" "${slice[@]}"
  exit "$status"
}

plan() {
  source=${flag[source]:-$here/..}
  newest
  attempt
  echo "# again after all but 0, 1 and 2, as long as this shows new checkpoints:"
  newest
  [[ -z ${flag[delete]:-} ]] || "$here/delete.sh" "${slice[@]}"
}

main "$@"
