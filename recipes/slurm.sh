#!/usr/bin/env bash
# A SLURM job of two nodes with four GPUs each. A minute before its time is up it is requeued; its
# next start resumes the run after the last whole epoch, until all epochs are done. So --time has to
# be long enough for several epochs.
#
#   sbatch recipes/slurm.sh --config recipes/original.yaml    # with any options of train.py fit
#
# Tried with SLURM 22.05 and two processes on one machine without GPUs, not on several nodes.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
# --requeue allows it, also after preemption or when a node fails. B: signals this script alone.
set -euo pipefail

job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # each task of an array is a run of its own
fi
root=runs/$job # the job's own, so that `last` is its last checkpoint and no other job's
if compgen -G "$root/lightning_logs/version_*/checkpoints/last.ckpt" > /dev/null; then
    set -- --ckpt last # the run keeps its options; given again, `+=` would add a second callback
else
    set -- --trainer.strategy ddp --trainer.num_nodes "$SLURM_NNODES" \
        --trainer.devices "$SLURM_NTASKS_PER_NODE" "$@"
fi

# SLURM then ends the tasks and this script; checkpoints are written whole or not at all.
trap 'scontrol requeue "$job"; wait' USR1
# In the background, as bash would run the trap only after a command in the foreground. Since
# SLURM 22.05 srun does not take --cpus-per-task from the job.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    python train.py fit --trainer.default_root_dir "$root" "$@" &
wait "$!"
