#!/usr/bin/env bash
# The quickstart with three seeds, and what they reach together: .ci/prompt_following.sh [SEED ...]
# Three quarters of an hour on two cores, so it is run by hand before a release and not by .ci/run.
# PYTHON names the interpreter, by default that of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
runs=()
for seed in ${*:-1 2 3}; do
  "$python" experiments/quickstart.py --workdir "runs/shapes-seed$seed" --seed "$seed"
  runs+=("runs/shapes-seed$seed")
done
"$python" .ci/prompt_following.py "${runs[@]}"
