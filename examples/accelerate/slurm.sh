#!/bin/bash
# Several nodes: one task a node starts that node's processes; any config of this folder, any script of examples/.
#   sbatch --nodes 32 examples/accelerate/slurm.sh zero3 examples/pretrain.py examples/configs/pretraining.yaml
# The same command again resumes from the last checkpoint; the output folder must be on a file system that all share.
#SBATCH --job-name=puma
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --requeue
set -euo pipefail

CONFIG=$1
shift
GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))

# \$SLURM_NODEID is another on each node, so it is expanded there.
srun --kill-on-bad-exit=1 bash -c "accelerate launch \
    --config_file examples/accelerate/$CONFIG.yaml \
    --num_machines $SLURM_NNODES \
    --num_processes $((SLURM_NNODES * GPUS_PER_NODE)) \
    --machine_rank \$SLURM_NODEID \
    --main_process_ip $MASTER \
    --main_process_port $PORT \
    $(printf '%q ' "$@")"
