#!/usr/bin/env bash
# Train on a SLURM cluster of GPUs, with one process per GPU, which JAX detects from SLURM's variables.
#
#   sbatch experiments/launch/slurm.sh experiments/configs/clips.py --data CLIPS --workdir runs/clips
#
# All arguments are passed to experiments/train.py, or to another script: SCRIPT=experiments/finetune.py sbatch ….
# The run's folder must be on a file system that all nodes share.
# The config sets the size of the mesh (`--mesh.fsdp 8`); -1 stands for the remaining devices.
#SBATCH --job-name=dit-video
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Send SIGTERM two minutes before the time limit, as on preemption: the training saves and exits.
#SBATCH --signal=TERM@120
# Requeue the job after a preemption or a lost node; it continues from its newest checkpoint.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# JAX would connect to the other nodes through a proxy.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

# Bitwise reproducible runs need these flags; they cost speed.
# export XLA_FLAGS="--xla_gpu_deterministic_ops=true --xla_gpu_exclude_nondeterministic_ops=true"

# With --kill-on-bad-exit, a process that fails (exit code 2) ends the whole step. Exit code 75 asks for a retry: a
# signal stopped the run, which has saved, or a process was lost, which the log names.
code=0
srun --kill-on-bad-exit=1 python -u "${SCRIPT:-experiments/train.py}" "$@" --stopped-code 75 || code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
