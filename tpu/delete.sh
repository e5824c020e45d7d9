#!/usr/bin/env bash
# Deletes a slice with all its nodes and disks, whatever runs on it. What is in a bucket stays.
#
#   tpu/delete.sh --name=NAME --zone=ZONE
#
#   --name=NAME        of the queued resource
#   --zone=ZONE        such as us-east5-a
#   --project=PROJECT  another than gcloud's own
#   --dry-run          print the commands, run none
#
# Exit status: 0 it is not there any more; 1 gcloud refused; 2 wrong flags.

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/arguments.sh"
. "$here/slice.sh"

main() {
  parse "name= zone= project= dry-run" "$@"
  need name zone
  check_flags
  dry_run || look
  case ${state:-} in
    NONE) say "there is no ${flag[name]} in ${flag[zone]}" ;;
    UNKNOWN) exit 1 ;;
    *) tpus delete "${flag[name]}" --force ;;
  esac
}

main "$@"
