#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster that XPK made, as a JobSet.
#
#   experiments/launch/xpk.sh CLUSTER IMAGE experiments/configs/clips.py --data gs://BUCKET/clips --workdir /runs/clips
#
# IMAGE is the image of experiments/launch/Dockerfile with PLATFORM=tpu, in a registry that the cluster reads. The
# arguments after IMAGE are those of experiments/train.py, or of SCRIPT=experiments/finetune.py. Set in the environment:
#   WORKLOAD    name of the workload, dit-video by default
#   TPU_TYPE    type of a slice, v5litepod-16 by default
#   SLICES      number of slices, 1 by default; with more, --parallel.data must be a multiple of it
#   STORAGE     name of a storage of the cluster (`xpk storage attach`) that is mounted at /runs
#   XPK         options of XPK, such as "--dry-run --project=PROJECT --zone=ZONE"
set -euo pipefail
if [ "$#" -lt 3 ]; then
  echo "usage: $0 CLUSTER IMAGE CONFIG [arguments of experiments/train.py]" >&2
  exit 2
fi
cluster="$1" image="$2"
shift 2

# XPK runs the command in a subshell, to which it sends SIGTERM, so that Python has to take the subshell's place.
command="cd /dit_video && exec python -u $(printf '%q ' "${SCRIPT:-experiments/train.py}" "$@" --stopped-code 75)"
# Exit codes other than 75 (try again), 42 and 127 to 255 end the workload. DIT_VIDEO_PREEMPTION_GRACE, the seconds to
# save and exit after SIGTERM, is less than the pods' grace period.
read -ra more <<<"${XPK:-}"
exec xpk workload create --cluster="$cluster" --workload="${WORKLOAD:-dit-video}" --docker-image="$image" \
  --tpu-type="${TPU_TYPE:-v5litepod-16}" --num-slices="${SLICES:-1}" ${STORAGE:+"--storage=$STORAGE"} \
  --max-restarts=50 --restart-on-exit-codes=75 --termination-grace-period-seconds=120 \
  --env=DIT_VIDEO_PREEMPTION_GRACE=100 --command="$command" ${more[@]+"${more[@]}"}
