#!/usr/bin/env bash
# A training on a Cloud TPU slice of any number of hosts (TPU VMs): the same command on each, which JAX joins by itself.
#
#   experiments/launch/tpu_vm.sh NAME ZONE experiments/configs/clips.py --data gs://BUCKET/clips --workdir /mnt/clips
#
# NAME is a slice that has this project at ~/dit_video, installed with `pip install -e .[tpu]`. What follows ZONE goes
# to experiments/train.py. The run's folder has to lie where all hosts see it (Filestore, or a bucket mounted with
# gcsfuse). On maintenance and preemption the hosts get SIGTERM: the training saves and ends with 0. A slice that is
# gone has to be made again, by a queued resource; the same command then goes on from the newest checkpoint.
set -euo pipefail
if [ "$#" -lt 3 ]; then
  echo "usage: $0 NAME ZONE CONFIG [arguments of experiments/train.py]" >&2
  exit 2
fi
name="$1" zone="$2"
shift 2

# Quoted once more, for the shells of the hosts.
arguments="$(printf '%q ' "$@")"

gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd ~/dit_video && python -u experiments/train.py $arguments"
