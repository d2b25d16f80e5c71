#!/usr/bin/env bash
# A run on several machines under Slurm, 2 of 8 GPUs by default. From the root of the repository:
#
#   mkdir -p logs && sbatch scripts/slurm_multi_node.sh recipes/qwen_toy.yaml [key=value ...]
#   sbatch --nodes=4 --time=08:00:00 scripts/slurm_multi_node.sh recipes/qwen_toy.yaml     # flags beat the lines below
#
# 300 s before the time limit the run saves a checkpoint, the job goes back into the queue, and continues from there.
# The effective batch grows with the number of GPUs; global_batch_size=N gradient_accumulation_steps=1 holds it at N rows.
#SBATCH --job-name=arpo_trl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.log
set -uo pipefail

config=accelerate_configs/multi_node.yaml # or fsdp2.yaml, zero3.yaml: the flags below make them span machines

if [ $# -eq 0 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "usage: sbatch scripts/slurm_multi_node.sh RECIPE [key=value ...]" >&2
    exit 2
fi
if [ -f .venv/bin/activate ]; then
    . .venv/bin/activate
fi
gpus=${SLURM_GPUS_ON_NODE:-8}
export CONFIG=$config PROCESSES=$((SLURM_NNODES * gpus))
MAIN_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_HOST MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs that share a machine don't meet
# torchrun kills 30 s after a SIGTERM, too soon to save a large model; torch 2.13 reads this variable.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280

# SIGTERM reaches only this shell (the B: above). srun itself would answer it with SIGKILL, so scancel passes it on.
stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# overwrite_output_dir=false: the job that comes back has to continue, whatever the recipe says
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$CONFIG" --num_machines "$SLURM_NNODES" \
    --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_HOST" \
    --main_process_port "$MAIN_PORT" -m arpo_trl "$@"' arpo_trl "$@" overwrite_output_dir=false &
step=$!
wait "$step"
code=$?
if [ -n "$stopped" ]; then
    wait "$step" # the first wait was cut short by the trap
    code=$?
    if [ "$code" -ne 0 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
