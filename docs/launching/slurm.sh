#!/bin/bash
# sbatch docs/launching/slurm.sh --config ...: its arguments are those of launch/train.py.
#SBATCH --job-name=moebius
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# Some minutes before the time is over all ranks finish their step and save; --resume goes on.
#SBATCH --signal=TERM@300
set -euo pipefail
source .venv/bin/activate

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One task a node, each of which starts the ranks of its node. Where one fails Slurm ends the others.
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 10000))" \
    --shutdown-timeout 240 \
    launch/train.py "$@"
