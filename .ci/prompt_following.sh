#!/usr/bin/env bash
# Run the quickstart with three seeds and check their pooled metrics: .ci/prompt_following.sh [SEED ...]
# CONFIG=unet trains its U-Net instead of its transformer.
# This takes 45 minutes on two cores, so it is run by hand before a release and not by .ci/run.
# Set PYTHON to choose the interpreter; the default is that of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
runs=()
for seed in ${*:-1 2 3}; do
  workdir="runs/${CONFIG:-quickstart}-seed$seed"
  "$python" experiments/quickstart.py --config "${CONFIG:-quickstart}" --workdir "$workdir" --seed "$seed"
  runs+=("$workdir")
done
"$python" .ci/prompt_following.py --config "${CONFIG:-quickstart}" "${runs[@]}"
