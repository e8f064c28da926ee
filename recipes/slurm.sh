#!/usr/bin/env bash
# A job for SLURM: two nodes of four GPUs. It goes on by itself when it was preempted or its time was
# up, in the same run, until that has its epochs behind it.
#
#   sbatch recipes/slurm.sh --config recipes/seed.yaml    # with any options of train.py fit
#
# Tried with stand-ins for srun and scontrol and two processes over loopback, not on a cluster.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

root=runs/$SLURM_JOB_ID # the job's own: `last` is its last checkpoint, and no other job's
go_on=()
if compgen -G "$root/lightning_logs/version_*/checkpoints/last.ckpt" > /dev/null; then
    go_on=(--ckpt last)
fi
srun python train.py fit --trainer.default_root_dir "$root" --trainer.strategy ddp \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
    "${go_on[@]}" "$@"
