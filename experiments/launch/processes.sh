#!/usr/bin/env bash
# A training as several processes of this machine, or of hosts that no cluster manages: JAX is told who is there.
#
#   experiments/launch/processes.sh 2 experiments/configs/clips.py --data CLIPS --workdir runs/clips
#
# On several hosts start one process on each by hand, with these three variables, and the same command:
#   COORDINATOR_ADDRESS=host0:1234 NUM_PROCESSES=2 PROCESS_ID=0 python experiments/train.py …
# A signal to this script goes to all processes. It ends with the first exit code that isn't 0.
set -euo pipefail
if [ "$#" -lt 2 ]; then
  echo "usage: $0 COUNT CONFIG [arguments of experiments/train.py]" >&2
  exit 2
fi
count="$1"
shift

export COORDINATOR_ADDRESS="${COORDINATOR_ADDRESS:-127.0.0.1:12355}"
export NUM_PROCESSES="$count"
processes=()
for ((index = 0; index < count; index++)); do
  PROCESS_ID="$index" python -u experiments/train.py "$@" &
  processes+=("$!")
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' TERM INT

result=0
for process in "${processes[@]}"; do
  code=0
  # A signal ends the wait, not the process.
  while :; do
    code=0
    wait "$process" || code=$?
    kill -0 "$process" 2>/dev/null || break
  done
  [ "$result" -ne 0 ] || result="$code"
done
exit "$result"
