#!/usr/bin/env bash
# Train on Cloud TPU VMs of a queued resource: the same command on each host; JAX detects the processes.
#
#   experiments/launch/tpu_vm.sh NAME ZONE experiments/configs/clips.py --data gs://BUCKET/clips --workdir /mnt/clips
#
# A queued resource NAME is created if there is none, or if its slices were preempted or have failed, and waited for.
# Then SETUP runs on all hosts, and the training. Call the script again after a preemption: the run continues from its
# newest checkpoint. Arguments after ZONE are passed to experiments/train.py, or to another script
# (SCRIPT=experiments/finetune.py). The run's folder must be on a file system that all hosts share, such as Filestore.
# On maintenance and preemption the hosts receive SIGTERM: the training saves and exits with code 0. Set in the
# environment:
#   TYPE, RUNTIME   type of a slice and its software, v5litepod-16 and v2-alpha-tpuv5-lite by default
#   SLICES          number of slices, 1 by default; with more, --parallel.data must be a multiple of it
#   RESERVE         --spot (the default), --reserved or --guaranteed
#   SETUP           a command that brings this project to ~/dit_video and mounts what the hosts share, such as
#                   "git clone REPOSITORY dit_video; cd dit_video && pip install -e '.[tpu,gcs]' -c constraints.txt"
set -euo pipefail
if [ "$#" -lt 3 ]; then
  echo "usage: $0 NAME ZONE CONFIG [arguments of experiments/train.py]" >&2
  exit 2
fi
name="$1" zone="$2"
shift 2
slices="${SLICES:-1}"

state() {
  gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)' 2>/dev/null || true
}

case "$(state)" in
  SUSPENDED | SUSPENDING | FAILED)
    gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet
    ;;
esac
if [ -z "$(state)" ]; then
  nodes=(--node-id="$name")
  [ "$slices" -eq 1 ] || nodes=(--node-count="$slices" --node-prefix="$name")
  gcloud compute tpus queued-resources create "$name" --zone="$zone" "${nodes[@]}" \
    --accelerator-type="${TYPE:-v5litepod-16}" --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" "${RESERVE:---spot}"
fi
until [ "$(state)" = ACTIVE ]; do
  echo "$name: $(state)" >&2
  sleep "${POLL_SECONDS:-30}"
done

on_all_hosts() {
  gcloud compute tpus queued-resources ssh "$name" --zone="$zone" --node=all --worker=all --batch-size=all \
    --command="$1"
}

if [ -n "${SETUP:-}" ]; then
  on_all_hosts "$SETUP"
fi
# Spot slices have 30 seconds to save and exit. The arguments are quoted once more, for the shells of the hosts.
training="DIT_VIDEO_PREEMPTION_GRACE=25 python -u $(printf '%q ' "${SCRIPT:-experiments/train.py}" "$@")"
on_all_hosts "cd ~/dit_video && $training"
