#!/usr/bin/env bash
# Runs a command on all workers of all slices, detached from this machine, and shows what worker 0 prints.
#
#   tpu/run.sh --name=NAME --zone=ZONE -- python -m ldm_jax.train --workdir=gs://BUCKET/RUN ... --distributed
#
# Closing the laptop, or Ctrl-C, leaves the run alone; the same command attaches to it again, and says how it ended
# if it has ended meanwhile. The workers' logs come to --logs, as slice-0-worker-0.log and so on.
#
#   --name=NAME        of the queued resource, and of the run: there is one at a time
#   --zone=ZONE        such as us-east5-a
#   --logs=logs/NAME   directory of the logs on this machine
#   --stop             end it: training then saves a last checkpoint and ends with 75
#   --poll=30          seconds between looks at the workers
#   --project=PROJECT  another than gcloud's own
#   --dry-run          print the commands, run none
#
# Exit status: the command's, of the worker that explains the others: 1 or 2 if there is one, else any but those that
# follow, else 134 or 76 (lost another process), else 75 (stopped and saved), else 0. 76 as well if a worker or a
# slice is gone, 130 after Ctrl-C.

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/arguments.sh"
. "$here/slice.sh"

ABORTED=134 # what JAX ends a process with that lost another
PATIENCE=10 # looks for which workers may be silent, or outlive one that failed

# Sets `results`, one line a worker: HOST RESULT. Asks again while some do not answer and their slice is not gone.
ask() {
  local missing=0
  while
    results=$(answers "$1" 2>>"$logs/gcloud.log")
    (($(grep -c . <<<"$results") < workers))
  do
    must_be_there
    sleep "${flag[poll]:-30}"
  done
}

# Sets the `missing` of its caller. This machine may be offline, for as long as it likes.
must_be_there() {
  look
  case $state in
    UNKNOWN) ;;
    ACTIVE) missing=$((missing + 1)) ;;
    *) say "${flag[name]} is gone: its state is $state" && exit "$LOST" ;;
  esac
  if ((missing == PATIENCE)); then
    say "${flag[name]} is ACTIVE, but only $(grep -c . <<<"$results") of $workers workers answer; see $logs/gcloud.log"
    exit "$LOST"
  fi
}

# The status of the run, also where setup.sh has never been.
look_around() { ask "status ${flag[name]} || echo ldm_jax \$HOSTNAME uninstalled"; }

begin() {
  look_around
  if grep -q ' uninstalled$' <<<"$results"; then
    say "nothing is installed on ${flag[name]}: tpu/setup.sh --name=${flag[name]} --zone=${flag[zone]}"
    exit 1
  elif grep -qv ' none$' <<<"$results"; then
    ask "start ${flag[name]} $(quoted "${command[@]}")"
    say "attached to what is there already: $(cut -d' ' -f2- <<<"$results" | sort -u)"
  else
    put_logs_away
    ask "start ${flag[name]} $(quoted "${command[@]}")"
  fi
}

put_logs_away() {
  local earlier
  [[ -e $logs/slice-0-worker-0.log ]] || return 0
  earlier=$logs/until-$(date -u +%Y%m%dT%H%M%S)
  mkdir -p "$earlier"
  mv "$logs"/slice-*.log "$earlier"
}

# Shows the log of worker 0 line by line, over broken connections; its file here says how far it got.
stream() {
  local log=$logs/slice-0-worker-0.log next
  while kill -0 $$ 2>/dev/null; do # $$ is the script that this is a part of
    next=$(($(wc -l <"$log") + 1))
    on_workers "bash worker.sh follow ${flag[name]} $next" 0 0 2>>"$logs/gcloud.log" | tee -a "$log" || true
    sleep "${flag[poll]:-30}"
  done
}

start_stream() {
  trap stop_stream EXIT
  trap 'trap "" INT; say "the run goes on without this machine; the same command attaches to it, with --stop it ends"; exit 130' INT
  touch "$logs/slice-0-worker-0.log"
  stream &
  streamer=$!
}

stop_stream() {
  [[ -n ${streamer:-} ]] || return 0
  kill_tree "$streamer"
  wait "$streamer" 2>/dev/null || true
  streamer=""
}

# Stops before it kills, as a process that runs on could start another child meanwhile.
kill_tree() {
  local child
  kill -STOP "$1" 2>/dev/null || return 0
  for child in $(pgrep -P "$1"); do kill_tree "$child"; done
  kill -TERM "$1" 2>/dev/null || true
  kill -CONT "$1" 2>/dev/null || true
}

# Returns when all workers have ended, with `results` how.
await() {
  local failing=0
  while ask "status ${flag[name]}" && grep -q ' running$' <<<"$results"; do
    if grep -qv -e ' running$' -e ' 0$' <<<"$results"; then
      failing=$((failing + 1))
      ((failing % PATIENCE)) || end_the_rest "$failing"
    fi
    sleep "${flag[poll]:-30}"
  done
}

end_the_rest() {
  local signal=TERM
  (($1 == PATIENCE)) || signal=KILL
  say "$signal to the workers that run on, as others failed: $(grep -v ' running$' <<<"$results" | paste -sd, -)"
  ask "signal ${flag[name]} $signal"
}

# The logs of all workers, eight at a time; worker 0's is shown from where the stream has got to.
gather() {
  local slice worker log shown
  shown=$(wc -l <"$logs/slice-0-worker-0.log")
  for ((slice = 0; slice < slices; slice++)); do
    for ((worker = 0; worker < workers_per_slice; worker++)); do
      log=$logs/slice-$slice-worker-$worker.log
      fetch "$slice" "$worker" "$log" &
      (($(jobs -rp | wc -l) < 8)) || wait -n || true
    done
  done
  wait
  tail -n "+$((shown + 1))" "$logs/slice-0-worker-0.log"
}

fetch() {
  if on_workers "bash worker.sh follow ${flag[name]} 1" "$1" "$2" >"$3.new" 2>>"$logs/gcloud.log"; then
    mv "$3.new" "$3"
  else
    say "the log of slice $1, worker $2 could not be fetched"
    rm -f "$3.new"
  fi
}

# What the run as a whole ended with: $1 is one line a worker.
verdict() {
  local status statuses
  statuses=$(sed "s/.* //; s/lost/$LOST/" <<<"$1")
  for status in 1 2 $(grep -vxE "0|75|$LOST|$ABORTED" <<<"$statuses" || true) "$ABORTED" "$LOST" 75; do
    if grep -qx "$status" <<<"$statuses"; then
      say "ended with $status; by worker: $(grep -v ' 0$' <<<"$1" | paste -sd, -)"
      return "$status"
    fi
  done
  say "ended with 0 on all $workers workers"
}

stop() {
  look_around
  if grep -q -e ' none$' -e ' uninstalled$' <<<"$results"; then
    say "nothing runs on ${flag[name]}"
    exit 1
  fi
  ask "signal ${flag[name]} TERM"
}

plan() {
  describe
  on_workers "bash worker.sh status ${flag[name]} || echo ldm_jax \$HOSTNAME uninstalled"
  if [[ -n ${flag[stop]:-} ]]; then
    on_workers "bash worker.sh signal ${flag[name]} TERM"
  else
    on_workers "bash worker.sh start ${flag[name]} $(quoted "${command[@]}")"
  fi
  echo "# until the run has ended on all workers:"
  on_workers "bash worker.sh follow ${flag[name]} 1" 0 0
  on_workers "bash worker.sh status ${flag[name]}"
  echo "# then, of every worker of every slice, as here of worker 0 of slice 0:"
  on_workers "bash worker.sh follow ${flag[name]} 1" 0 0
  on_workers "bash worker.sh forget ${flag[name]}"
}

main() {
  parse "name= zone= logs= stop poll= project= dry-run --" "$@"
  need name zone
  check_flags
  [[ -n ${flag[stop]:-} || ${#command[@]} -gt 0 ]] || refuse "the command is missing: -- python -m ldm_jax.train ..."
  logs=${flag[logs]:-logs/${flag[name]}}
  if dry_run; then
    plan
    return
  fi
  need_active
  mkdir -p "$logs"
  if [[ -n ${flag[stop]:-} ]]; then stop; else begin; fi
  start_stream
  await
  stop_stream
  gather
  ended=$results
  ask "forget ${flag[name]}"
  verdict "$ended"
}

main "$@"
