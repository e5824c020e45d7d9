#!/usr/bin/env bash
# Starts a run on GKE: fills in tpu/jobset.yaml and applies it to the cluster that kubectl is set to.
#
#   tpu/jobset.sh --name=NAME --image=IMAGE --accelerator=v5p:4x4x4 --mount=BUCKET:/mnt/data \
#     -- python -m ldm_jax.train --config=... --workdir=gs://BUCKET/RUN --distributed
#
#   --name=NAME               of the JobSet
#   --image=IMAGE             with the project installed, such as tpu/Dockerfile makes
#   --accelerator=SLICE       v4, v5e, v5p or v6e with a topology (v5p:4x4x4), or gcloud's name for it (v5p-128)
#   --slices=1                more than one: multislice
#   --mount=BUCKET:DIRECTORY  bucket that gcsfuse mounts
#   --service-account=default Kubernetes service account that may read and write the buckets
#   --restarts=10             restarts after crashes; those after preemption are not counted
#   --grace=300               seconds that a process has for its last checkpoint
#   --dry-run                 print the command, run none
#
# Exit status: kubectl's; 2 wrong flags.

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/arguments.sh"
. "$here/slice.sh"

declare -A LABEL=([v4]=tpu-v4-podslice [v5e]=tpu-v5-lite-podslice [v5p]=tpu-v5p-slice [v6e]=tpu-v6e-slice)

# The words as a JSON list, which YAML reads.
json() {
  local word line=""
  for word; do
    word=${word//\\/\\\\}
    line+=", \"${word//\"/\\\"}\""
  done
  echo "[${line#, }]"
}

manifest() {
  local text key
  local -A value=(
    [NAME]=${flag[name]} [IMAGE]=${flag[image]}
    [ACCELERATOR]=${LABEL[$generation]} [TOPOLOGY]=$topology [CHIPS]=$((chips / workers))
    [SLICES]=${flag[slices]:-1} [WORKERS]=$workers [RESTARTS]=${flag[restarts]:-10} [GRACE]=${flag[grace]:-300}
    [ACCOUNT]=${flag[service-account]:-default} [BUCKET]=${flag[mount]%%:*} [DIRECTORY]=${flag[mount]#*:}
  )
  text=$(<"$here/jobset.yaml")
  for key in "${!value[@]}"; do text=${text//"\$$key"/"${value[$key]}"}; done
  echo "${text/"\$COMMAND"/"$(json "${command[@]}")"}" # the last, as it may hold a $ of its own
}

main() {
  parse "name= image= accelerator= slices= mount= service-account= restarts= grace= dry-run --" "$@"
  need name image mount
  check_flags
  must_match service-account '[a-z0-9][-a-z0-9.]*' "the name of a Kubernetes service account"
  must_match image '[A-Za-z0-9][A-Za-z0-9._/:@-]*' \
    "an image, such as us-docker.pkg.dev/PROJECT/REPOSITORY/ldm_jax"
  need_accelerator
  ((${#command[@]})) || refuse "the command is missing: -- python -m ldm_jax.train ..."
  ((${flag[slices]:-1} == 1 || workers > 1)) ||
    refuse "--slices=${flag[slices]}: slices of one worker, as $generation:$topology is, cannot be joined on GKE"
  if dry_run; then
    printf "kubectl apply --filename=- <<'END'\n%s\nEND\n" "$(manifest)"
  else
    manifest | kubectl apply --filename=-
  fi
}

main "$@"
