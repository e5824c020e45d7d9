# shellcheck shell=bash disable=SC2034  # set here, used where it is sourced
# Flags of the scripts here, and their dry run. Sourced.
#
# A script's header comment is its --help. `parse` fills `flag` (by name), `create_flags` (every --create-flag)
# and `command` (what stands after --). With --dry-run, `call` prints a command in place of running it.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "${0##*/} needs bash 4.4 or later, and this is $BASH_VERSION" >&2
  exit 2
fi

ON="(on)" # value of a flag that takes none
declare -A flag=()
declare -a create_flags=() command=()

say() { echo "${0##*/}: $*" >&2; }

# Wrong use: one sentence, exit 2.
refuse() {
  say "$*"
  exit 2
}

help() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# parse "name= zone= dry-run ..." "$@": a name with = takes a value.
parse() {
  local allowed=" $1 "
  shift
  while (($#)); do
    case $1 in
      --)
        command=("${@:2}")
        [[ $allowed == *" -- "* ]] || refuse "there is no command after -- here; --help lists what can be given"
        return
        ;;
      -h | --help) help && exit 0 ;;
      --*) parse_flag "$allowed" "$1" ;;
      *) refuse "got $1, which is no flag; flags are --name=VALUE, and a command stands after --" ;;
    esac
    shift
  done
}

# The names in a list for `parse`, as flags.
listed() { sed 's/ -- / /; s/ \([^ ]*\)/ --\1/g; s/= / /g; s/ --$//' <<<"$1"; }

parse_flag() {
  local allowed=$1 name=${2#--} value=$ON kind=""
  [[ $name == *=* ]] && value=${name#*=} name=${name%%=*} kind="="
  if [[ $allowed != *" $name$kind "* ]]; then
    [[ $allowed == *" $name= "* ]] && refuse "--$name needs a value: --$name=VALUE"
    [[ $allowed == *" $name "* ]] && refuse "--$name takes no value, got $2"
    refuse "there is no --$name here; there are$(listed "$allowed") and --help"
  fi
  if [[ $name == create-flag ]]; then create_flags+=("$value"); else flag[$name]=$value; fi
}

need() {
  local name
  for name; do
    [[ -n ${flag[$name]:-} ]] || refuse "--$name=VALUE is missing; --help says what it is"
  done
}

# must_match NAME PATTERN "what is allowed": only looks at a flag that was given.
must_match() {
  [[ -z ${flag[$1]:-} || ${flag[$1]} =~ ^($2)$ ]] || refuse "--$1=${flag[$1]} is not $3"
}

# The flags that mean the same in every script that has them.
check_flags() {
  must_match name '[a-z]([-a-z0-9]{0,58}[a-z0-9])?' \
    "a name: up to 60 of a-z, 0-9 and -, a letter first and no - last"
  must_match zone '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-east5-a"
  must_match project '([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]' "the id of a project"
  must_match slices '[1-9][0-9]*' "a number of slices, at least 1"
  must_match poll '[0-9]+([.][0-9]+)?' "a number of seconds"
  must_match restarts '[0-9]+' "a number of restarts"
  must_match grace '[1-9][0-9]*' "a number of seconds"
  must_match mount '(gs://)?[a-z0-9][-a-z0-9_.]+:/[^: ]+' "BUCKET:/DIRECTORY"
  [[ -z ${flag[mount]:-} ]] || flag[mount]=${flag[mount]#gs://}
}

dry_run() { [[ -n ${flag[dry-run]:-} ]]; }

# The words of a command, so quoted that a shell reads them back.
quoted() {
  local word line=""
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=\'${word//\'/\'\\\'\'}\'
    line+=" $word"
  done
  echo "${line# }"
}

call() { if dry_run; then quoted "$@"; else "$@"; fi; }
