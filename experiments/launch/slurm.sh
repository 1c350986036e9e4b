#!/usr/bin/env bash
# Train on a SLURM cluster of GPUs, with one process per GPU, which JAX detects from SLURM's variables.
#
#   sbatch experiments/launch/slurm.sh experiments/configs/clips.py --data CLIPS --workdir runs/clips
#
# All arguments are passed to experiments/train.py, or to another script: SCRIPT=experiments/finetune.py sbatch ….
# The run's folder must be on a file system that all nodes share.
# The config sets the size of the mesh (`--parallel.fsdp 8`); -1 stands for the remaining devices.
#SBATCH --job-name=dit-video
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
# All tasks of a node see all of its GPUs, and JAX takes the one with the task's number on the node. With
# --gpus-per-task each task would see one GPU, with the number 0.
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Two minutes before the time limit the processes receive SIGTERM, and not this script: the training saves and exits.
#SBATCH --signal=TERM@120
# SLURM itself requeues the job after a preemption or a lost node; it continues from its newest checkpoint.
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# JAX would connect to the other nodes through a proxy.
unset http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY

# Bitwise reproducible runs need these flags; they cost speed.
# export XLA_FLAGS="--xla_gpu_deterministic_ops=true --xla_gpu_exclude_nondeterministic_ops=true"

# The program of a task. In containers, one of:
#   Apptainer:        program=(apptainer exec --nv --bind "$PWD" IMAGE.sif python -u)
#   pyxis and enroot: step=(--container-image=IMAGE --container-mounts="$PWD" --container-workdir="$PWD")
program=(python -u)
step=()

# Seconds to save and exit after SIGTERM: less than --signal, so that a save that hangs is reported.
export DIT_VIDEO_PREEMPTION_GRACE=100

# Since 22.05 srun does not take --cpus-per-task over from sbatch, and would bind each task to one core.
# If a process is lost, the others exit within `--patience.max-silence` (60 s). They need that time, so the
# step must not end with its first task (--kill-on-bad-exit); --wait ends it if they hang.
code=0
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=120 ${step[@]+"${step[@]}"} \
  "${program[@]}" "${SCRIPT:-experiments/train.py}" "$@" --stopped-code 75 || code=$?

# This is the highest exit code of the tasks. 0: finished. 2: a user error. 75: stopped by a signal and saved, or
# a process hung. 134: another process was lost. 137: a task was killed, for example since it was out of memory. All but the first two may
# succeed at a retry.
if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
  exit "$code"
fi
restarts="${SLURM_RESTART_COUNT:-0}"
if [ "$restarts" -ge "${MAX_RESTARTS:-50}" ]; then
  echo "exit code $code after $restarts restarts: the job ends. Submit it again, with a larger MAX_RESTARTS." >&2
  exit "$code"
fi
echo "exit code $code after $restarts restarts: the job is requeued" >&2
scontrol requeue "$SLURM_JOB_ID" || echo "SLURM did not requeue the job" >&2 # as after `scontrol update … Requeue=0`
exit "$code"
