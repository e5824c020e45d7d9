#!/usr/bin/env bash
# What a worker does for the other scripts: setup.sh copies this file to it, setup.sh and run.sh call it by ssh.
#
#   bash worker.sh install SOURCE [BUCKET:DIRECTORY]  SOURCE: a .tar.gz, or the url of a git repository with #REVISION
#   bash worker.sh status NAME                        uninstalled, none, running, lost (ended without a word), or
#                                                     the exit status of the command
#   bash worker.sh start NAME COMMAND...              detached, where the status is none
#   bash worker.sh signal NAME TERM                   to all its processes
#   bash worker.sh follow NAME LINE                   its log from a line on, until it ends
#   bash worker.sh forget NAME                        its end was fetched; the status is none again
#
# All is in the home directory: ldm_jax (the source), venv, and of a run runs/NAME/{command,log,pid,status}. Each
# action but `follow` answers with one line, `ldm_jax HOST RESULT`.

# shellcheck disable=SC2329  # functions are called by the names of the actions
set -euo pipefail

say() { echo "ldm_jax $HOSTNAME $*"; }

alive() { [[ -f $1/pid ]] && kill -0 -- "-$(<"$1/pid")" 2>/dev/null; }

install() {
  local run
  for run in runs/*; do
    if [[ $(state "${run#runs/}") == running ]]; then
      say "kept as it is, a run is going on"
      return
    fi
  done
  if bash worker.sh build "$@" >install.log 2>&1; then
    say "installed"
  else
    tail -n 30 install.log | sed "s/^/$HOSTNAME: /" >&2
    say "failed"
  fi
}

build() {
  rm -rf ldm_jax
  if [[ $1 == *.tar.gz ]]; then
    mkdir ldm_jax
    tar -xzf "$1" -C ldm_jax
  else
    git clone --quiet "${1%%#*}" ldm_jax
    [[ $1 != *#* ]] || git -C ldm_jax checkout --quiet "${1#*#}"
  fi
  [[ -x venv/bin/python ]] || make_environment
  venv/bin/python -m pip install --quiet './ldm_jax[tpu]'
  [[ -z ${2:-} ]] || mount_bucket "${2%%:*}" "${2#*:}"
}

# The images may have no Python that is new enough; uv brings one.
make_environment() {
  local python
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$python" -m venv venv
      return
    fi
  done
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --python=3.12 venv
}

mount_bucket() {
  ! mountpoint -q "$2" || return 0
  command -v gcsfuse >/dev/null || install_gcsfuse
  sudo mkdir -p "$2"
  sudo chown "$(id -u)" "$2"
  gcsfuse --implicit-dirs "$1" "$2"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc apt=https://packages.cloud.google.com/apt
  curl -fsSL "$apt/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq
  sudo apt-get install -qq gcsfuse
}

state() {
  if [[ -f runs/$1/status ]]; then
    cat "runs/$1/status"
  elif alive "runs/$1"; then
    echo running
  elif [[ -f runs/$1/pid ]]; then
    echo lost
  elif [[ -x venv/bin/python && -d ldm_jax ]]; then
    echo none
  else
    echo uninstalled
  fi
}

status() { say "$(state "$1")"; }

# Outlives ssh, and the signals that the command gets, and writes down how that ended.
# shellcheck disable=SC2016  # expanded by the shell that runs it
DETACHED='
trap : HUP INT TERM
run=$PWD/$0 status=0
cd ldm_jax
"$@" || status=$?
echo "$status" >"$run/status.new"
mv "$run/status.new" "$run/status"
'

start() {
  local run=runs/$1
  if [[ $(state "$1") == none ]]; then
    shift
    mkdir -p "$run"
    echo "$*" >"$run/command"
    PATH=$HOME/venv/bin:$PATH PYTHONUNBUFFERED=1 setsid bash -c "$DETACHED" "$run" "$@" </dev/null >"$run/log" 2>&1 &
    echo "$!" >"$run/pid"
  fi
  say "$(<"$run/command")"
}

signal() {
  ! alive "runs/$1" || kill -s "$2" -- "-$(<"runs/$1/pid")"
  status "$1"
}

follow() {
  local run=runs/$1 until=()
  [[ $(state "$1") != running ]] || until=(-F --pid="$(<"$run/pid")")
  tail -n "+$2" "${until[@]}" "$run/log" 2>/dev/null
}

forget() {
  signal "$1" KILL >/dev/null
  rm -f "runs/$1/status" "runs/$1/pid"
  status "$1"
}

main() {
  cd "$HOME"
  "$@"
  exit
}

main "$@"
