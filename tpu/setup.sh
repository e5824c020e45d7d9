#!/usr/bin/env bash
# Installs the project on all workers of all slices, in a virtual environment with `pip install .[tpu]`.
#
#   tpu/setup.sh --name=NAME --zone=ZONE [--source=.] [--mount=BUCKET:/mnt/data]
#
# May be run again at any time; a worker on which a run is going on is left as it is.
#
#   --name=NAME               of the queued resource
#   --zone=ZONE               such as us-east5-a
#   --source=SOURCE           a git checkout with its uncommitted changes (default: the one that this script is in),
#                             a .tar.gz of one, or the url of a git repository, with #REVISION if wanted
#   --mount=BUCKET:DIRECTORY  mount a bucket by gcsfuse: ArrayRecord files cannot be read from gs:// directly
#   --project=PROJECT         another than gcloud's own
#   --pack=FILE.tar.gz        only write the checkout of --source to a file
#   --dry-run                 print the commands, run none
#
# Exit status: 0 installed everywhere; 1 an installation failed, its end is shown; 76 some worker does not answer;
# 2 wrong flags.

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/arguments.sh"
. "$here/slice.sh"

is_url() { [[ $1 == *://* || $1 == git@* ]]; }

# Sets `files`, which are copied to the workers, and `given`, what they install from.
bring() {
  local source=$1 archive=${scratch:+$scratch/}source.tar.gz
  files=("$here/worker.sh")
  given=$source
  is_url "$source" && return
  if [[ -d $source ]]; then
    call "$here/setup.sh" --source="$source" --pack="$archive"
  else
    call cp "$source" "$archive"
  fi
  files+=("$archive")
  given=source.tar.gz
}

must_be_checkout() {
  git -C "$1" rev-parse --git-dir >/dev/null 2>&1 ||
    refuse "--source=$1 is no git checkout, no .tar.gz and no url"
}

# The files of a checkout that git knows or would add.
pack() {
  local directory=$1 path
  must_be_checkout "$directory"
  git -C "$directory" ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' path; do
      [[ ! -e $directory/$path ]] || printf '%s\0' "$path"
    done | tar -czf "$2" -C "$directory" --null --files-from=-
}

install() {
  tpus scp "${files[@]}" "${flag[name]}:" --node=all --worker=all || say "some files could not be copied"
  if dry_run; then
    on_workers "bash worker.sh $1"
  else
    judge "$(answers "$1")"
  fi
}

judge() {
  local failed answered
  failed=$(sed -n 's/ failed$//p' <<<"$1" | xargs)
  answered=$(grep -c . <<<"$1" || true)
  if [[ -n $failed ]]; then
    say "the installation failed on $failed"
    return 1
  elif ((answered < workers)); then
    say "$answered of $workers workers answer"
    return "$LOST"
  fi
  say "installed on $workers workers"
}

main() {
  parse "name= zone= source= mount= project= pack= dry-run" "$@"
  local source=${flag[source]:-$here/..}
  if [[ -n ${flag[pack]:-} ]]; then
    pack "$source" "${flag[pack]}"
    return
  fi
  need name zone
  check_flags
  is_url "$source" || [[ $source == *.tar.gz && -f $source ]] || must_be_checkout "$source"
  if dry_run; then
    describe
  else
    need_active
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
  fi
  bring "$source"
  install "install $(quoted "$given" ${flag[mount]:+"${flag[mount]}"})"
}

main "$@"
