#!/usr/bin/env bash
# Requests a TPU slice, or several, as a queued resource and waits until it is ACTIVE.
#
#   tpu/create.sh --name=NAME --zone=ZONE --accelerator=v5p:4x4x4 [--spot | --reserved] [--slices=2]
#
# One that is there already is waited for; one that was preempted, or failed, is requested anew.
#
#   --name=NAME              of the queued resource
#   --zone=ZONE              such as us-east5-a
#   --accelerator=SLICE      v4, v5e, v5p or v6e with a topology (v5p:4x4x4), or gcloud's name for it (v5p-128)
#   --slices=1               more than one: multislice
#   --spot                   cheap, and may be preempted at any time
#   --reserved               from the project's reservation
#   --runtime-version=IMAGE  another than the generation's own
#   --create-flag=FLAG       one more flag for `gcloud ... create`, e.g. --create-flag=--network=mine; may be repeated
#   --project=PROJECT        another than gcloud's own
#   --poll=30                seconds between looks at the state
#   --dry-run                print the commands, run none
#
# Exit status: 0 ACTIVE; 76 the request failed, or gcloud cannot tell, and trying again may help; 1 gcloud refused;
# 2 wrong flags.

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/arguments.sh"
. "$here/slice.sh"

request() {
  local tier=() nodes=(--node-id="${flag[name]}")
  [[ -z ${flag[spot]:-} ]] || tier=(--spot)
  [[ -z ${flag[reserved]:-} ]] || tier=(--reserved)
  ((${flag[slices]:-1} == 1)) || nodes=(--node-count="${flag[slices]}" --node-prefix="${flag[name]}")
  tpus create "${flag[name]}" "${nodes[@]}" --accelerator-type="$wanted" \
    --runtime-version="${flag[runtime-version]:-${RUNTIME[$generation]}}" "${tier[@]}" "${create_flags[@]}"
}

must_be_as_wanted() {
  [[ $accelerator == "$wanted" && $slices == "${flag[slices]:-1}" ]] ||
    refuse "${flag[name]} is there as $slices x $accelerator, asked for is ${flag[slices]:-1} x $wanted:" \
      "tpu/delete.sh it, or give another --name"
}

# gcloud may fail to tell the state for a while, but not from the beginning.
is_in_sight() {
  if [[ $state != UNKNOWN ]]; then
    unknown=0
  elif ((++unknown == looks || unknown > 10)); then
    exit "$LOST"
  fi
}

await() {
  local before="" unknown=0 looks=0 requested=""
  while look; do
    looks=$((looks + 1))
    [[ $state == "$before" ]] || say "${flag[name]}: $state"
    before=$state
    case $state in
      ACTIVE) must_be_as_wanted && return ;;
      NONE)
        request
        requested=yes
        ;;
      SUSPENDED | FAILED)
        [[ -z $requested ]] || exit "$LOST"
        tpus delete "${flag[name]}" --force
        ;;
    esac
    is_in_sight
    sleep "${flag[poll]:-30}"
  done
}

main() {
  parse "name= zone= accelerator= slices= spot reserved runtime-version= create-flag= project= poll= dry-run" "$@"
  need name zone
  check_flags
  need_accelerator
  [[ -z ${flag[spot]:-} || -z ${flag[reserved]:-} ]] || refuse "--spot and --reserved exclude each other"
  wanted=$accelerator
  if dry_run; then
    describe && request && describe
  else
    await
  fi
}

main "$@"
