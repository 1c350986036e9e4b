#!/usr/bin/env bash
# A training on a SLURM cluster of GPUs: one process a GPU, which JAX finds from the step's own variables.
#
#   sbatch experiments/launch/slurm.sh experiments/configs/clips.py --data CLIPS --workdir runs/clips
#
# What follows the script's name goes to experiments/train.py. The run's folder has to lie where all nodes see it.
# Sizes of the mesh are in the config (`--mesh.fsdp 8`); -1 takes the devices that are left.
#SBATCH --job-name=dit-video
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Two minutes before the time is up, and on preemption, the training gets SIGTERM: it saves and ends.
#SBATCH --signal=TERM@120
# After a preemption or a lost node the same job is put into the queue again, and goes on from its newest checkpoint.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# JAX would ask a proxy for the way to the other nodes.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

# Runs that are to be the same to the bit need these; what they cost is in the README.
# export XLA_FLAGS="--xla_gpu_deterministic_ops=true --xla_gpu_exclude_nondeterministic_ops=true"

# With --kill-on-bad-exit a process that ends with an error (2) ends the step. 75 is for trying again: the run was
# stopped by a signal and has saved, or a process was lost, which the log names.
code=0
srun --kill-on-bad-exit=1 python -u experiments/train.py "$@" --stopped-code 75 || code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
