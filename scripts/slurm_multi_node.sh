#!/usr/bin/env bash
# Train on several nodes under Slurm, by default two with 8 GPUs each. From the root of the repository:
#
#   mkdir -p logs && sbatch scripts/slurm_multi_node.sh recipes/qwen_toy.yaml [key=value ...]
#   sbatch --nodes=4 --time=08:00:00 scripts/slurm_multi_node.sh recipes/qwen_toy.yaml     # flags override the lines below
#
# 300 s before the time limit the run saves a checkpoint, and the job is requeued and resumes from it.
# The global batch grows with the number of GPUs; global_batch_size=N gradient_accumulation_steps=1 keeps it at N rows.
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

config=accelerate_configs/multi_node.yaml # fsdp2.yaml and zero3.yaml span nodes with the flags below, too

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
export MAIN_HOST MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000)) # a port per job, as jobs may share a node
# By default torchrun kills its processes 30 s after SIGTERM, too soon to save a large model (read by torch 2.13).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280
# Since Slurm 22.05 srun does not inherit --cpus-per-task: https://slurm.schedmd.com/srun.html#OPT_cpus-per-task
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# Slurm sends SIGTERM to this shell alone (B: above). srun would respond to it with SIGKILL, so scancel forwards it.
stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# overwrite_output_dir=false: a requeued job has to resume, whatever the recipe sets
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$CONFIG" --num_machines "$SLURM_NNODES" \
    --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_HOST" \
    --main_process_port "$MAIN_PORT" -m arpo_trl "$@"' arpo_trl "$@" overwrite_output_dir=false &
step=$!
wait "$step"
code=$?
if [ -n "$stopped" ]; then
    wait "$step" # the trap interrupted the first wait
    code=$?
    if [ "$code" -ne 0 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
