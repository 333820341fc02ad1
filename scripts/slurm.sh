#!/usr/bin/env bash
# Runs one of fdistill's commands on several machines under SLURM, with a process for each GPU:
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 scripts/slurm.sh distill sdxl parallel=hybrid --output RUN --resume
# With --resume the same line starts a run and goes on with it. Five minutes before the time limit SLURM sends SIGUSR1: the run
# saves a checkpoint and ends.
#SBATCH --job-name=fdistill
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=USR1@300
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# Without torchrun between them, SLURM's signals reach the processes themselves.
# shellcheck disable=SC2016  # each task has its own numbers
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
  exec python -m fdistill "$@"
' fdistill "$@"
