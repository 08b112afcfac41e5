#!/bin/bash
# A run on nodes of eight GPUs, a process a node, from the root of an installed checkout:
#     sbatch docs/launch/slurm.sh --config llama3.1-8b --stage 1 --set run.mesh=fsdp=-1
# Checkout, .venv, data and run directory lie on a disk that all nodes share; or give gs:// and s3:// for the last two.
# It starts again by itself, at most MAX_RESTARTS times (50), where it was preempted (status 75), hung (76), lost a
# process (77) or had one killed (137), and goes on from the newest checkpoint. An error stops it.
#SBATCH --job-name=llama
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=llama-%j.log
# SIGTERM ten minutes before the time is over: for the step, its checkpoint and what else is under way.
#SBATCH --signal=TERM@600
set -u

. .venv/bin/activate
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/xla}

# jax reads from SLURM who the processes are. They end each other, saying why, so srun need not.
srun --kill-on-bad-exit=0 python -m train.pretrain "$@"
status=$?

case $status in
    75 | 76 | 77 | 137)
        if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-50}" ]; then
            echo "status $status: starting again" >&2
            scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
esac
exit "$status"
