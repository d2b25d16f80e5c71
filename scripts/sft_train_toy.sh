#!/usr/bin/env bash
# The toy run, started as ARPO's own scripts start theirs: where it runs comes from the environment.
#
#   bash scripts/sft_train_toy.sh                                # recipes/qwen_toy.yaml on one GPU, or on the CPU
#   bash scripts/sft_train_toy.sh recipes/tiny_cpu.yaml num_train_epochs=1     # another recipe, other values
#   CUDA_VISIBLE_DEVICES=0,1 bash scripts/sft_train_toy.sh       # one process a card
#   NNODES=2 NODE_RANK=0 PROC_PER_NODE=8 MASTER_ADDR=10.0.0.7 bash scripts/sft_train_toy.sh    # on each machine
#
# The run keeps its own training.log in its output folder. The launcher's lines (a process that died, a port in use) are
# only in the training.log here, which every launch appends to.
set -euo pipefail
cd "$(dirname "$0")/.."

NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
if [ -z "${PROC_PER_NODE:-}" ]; then
    cards=${CUDA_VISIBLE_DEVICES:-0}
    commas=${cards//[^,]/}
    PROC_PER_NODE=$((${#commas} + 1))
fi
processes=$((NNODES * PROC_PER_NODE))

recipe=recipes/qwen_toy.yaml
case "${1:-}" in
    '' | -* | *=*) ;; # a flag or an override: the recipe is left out
    *)
        recipe=$1
        shift
        ;;
esac
command -v accelerate > /dev/null || PATH="$PWD/.venv/bin:$PWD/.venv/Scripts:$PATH" # quickstart.sh's

launch=(--num_processes "$processes")
if [ "$processes" -eq 1 ]; then
    launch+=(--config_file accelerate_configs/single_gpu.yaml)
elif [ "$NNODES" -eq 1 ]; then
    launch+=(--config_file accelerate_configs/multi_gpu.yaml --main_process_port "$MASTER_PORT")
else
    launch+=(--config_file accelerate_configs/multi_node.yaml --num_machines "$NNODES" --machine_rank "$NODE_RANK"
        --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
fi

# The launcher imports torch before our code can say so: https://github.com/pytorch/pytorch/issues/139990 (Windows)
export USE_LIBUV=0
# -i: Ctrl-C is for the run, which saves a checkpoint and says so. -a: machines that share this folder write it together.
echo "# $(date '+%Y-%m-%d %H:%M:%S%z') $0 $recipe $*" >> training.log
accelerate launch "${launch[@]}" -m arpo_trl "$recipe" "$@" 2>&1 | tee -ia training.log
