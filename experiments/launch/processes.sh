#!/usr/bin/env bash
# Train with several processes on this machine, or on hosts without a cluster manager, which JAX cannot detect.
#
#   experiments/launch/processes.sh 2 experiments/configs/clips.py --data CLIPS --workdir runs/clips
#
# On several hosts, start one process on each by hand, with these three variables and the same arguments:
#   COORDINATOR_ADDRESS=host0:1234 NUM_PROCESSES=2 PROCESS_ID=0 python experiments/train.py …
# SCRIPT=experiments/finetune.py, distill.py or evaluate.py starts these instead of train.py.
# A signal to this script is sent to all processes. Its exit code is the first that is not 0.
set -euo pipefail
if [ "$#" -lt 2 ]; then
  echo "usage: $0 COUNT CONFIG [arguments of experiments/train.py, or of SCRIPT]" >&2
  exit 2
fi
count="$1"
shift

export COORDINATOR_ADDRESS="${COORDINATOR_ADDRESS:-127.0.0.1:12355}"
export NUM_PROCESSES="$count"
processes=()
for ((index = 0; index < count; index++)); do
  PROCESS_ID="$index" python -u "${SCRIPT:-experiments/train.py}" "$@" &
  processes+=("$!")
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' TERM INT

result=0
for process in "${processes[@]}"; do
  code=0
  # A signal interrupts `wait`, not the process, so wait again while the process is alive.
  while :; do
    code=0
    wait "$process" || code=$?
    kill -0 "$process" 2>/dev/null || break
  done
  [ "$result" -ne 0 ] || result="$code"
done
exit "$result"
