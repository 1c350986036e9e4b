#!/usr/bin/env bash
# Train on a Cloud TPU slice with any number of hosts (TPU VMs): the same command on each; JAX detects the processes.
#
#   experiments/launch/tpu_vm.sh NAME ZONE experiments/configs/clips.py --data gs://BUCKET/clips --workdir /mnt/clips
#
# NAME is a slice that has this project at ~/dit_video, installed with `pip install -e .[tpu]`. The arguments after ZONE
# are passed to experiments/train.py, or to another script (SCRIPT=experiments/finetune.py). The run's folder must be on a file system that all hosts share (Filestore, or a
# bucket mounted with gcsfuse). On maintenance and preemption the hosts receive SIGTERM: the training saves and exits
# with code 0. A lost slice must be created again, for example as a queued resource; then the same command continues
# from the newest checkpoint.
set -euo pipefail
if [ "$#" -lt 3 ]; then
  echo "usage: $0 NAME ZONE CONFIG [arguments of experiments/train.py]" >&2
  exit 2
fi
name="$1" zone="$2"
shift 2

# Quote the arguments once more, for the shells of the hosts.
arguments="$(printf '%q ' "$@")"

gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd ~/dit_video && python -u ${SCRIPT:-experiments/train.py} $arguments"
