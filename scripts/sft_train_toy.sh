#!/usr/bin/env bash
# Launch the toy run the way ARPO's scripts do: environment variables set the number of GPUs and nodes.
#
#   bash scripts/sft_train_toy.sh                                # recipes/qwen_toy.yaml on one GPU, or on the CPU
#   bash scripts/sft_train_toy.sh recipes/tiny_cpu.yaml num_train_epochs=1     # another recipe and other values
#   CUDA_VISIBLE_DEVICES=0,1 bash scripts/sft_train_toy.sh       # one process per GPU
#   NNODES=2 NODE_RANK=0 PROC_PER_NODE=8 MASTER_ADDR=10.0.0.7 bash scripts/sft_train_toy.sh    # on every node
#
# The run writes training.log to its output folder. The launcher's own messages (a process that died, a port in use) are
# only in the training.log of this folder; every launch appends to it.
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
    '' | -* | *=*) ;; # a flag or an override: no recipe was named
    *)
        recipe=$1
        shift
        ;;
esac
command -v accelerate > /dev/null || PATH="$PWD/.venv/bin:$PWD/.venv/Scripts:$PATH" # created by quickstart.sh

launch=(--num_processes "$processes")
if [ "$processes" -eq 1 ]; then
    launch=(-q "${launch[@]}" --config_file accelerate_configs/single_gpu.yaml) # -q: no traceback of the launcher
elif [ "$NNODES" -eq 1 ]; then
    launch+=(--config_file accelerate_configs/multi_gpu.yaml --main_process_port "$MASTER_PORT")
else
    launch+=(--config_file accelerate_configs/multi_node.yaml --num_machines "$NNODES" --machine_rank "$NODE_RANK"
        --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
fi

# Windows builds of torch have no libuv, and the launcher imports torch before arpo_trl can disable it:
# https://github.com/pytorch/pytorch/issues/139990
export USE_LIBUV=0
# -i: tee ignores Ctrl-C, so that the run can save a checkpoint and report it. -a: nodes that share this folder append.
echo "# $(date '+%Y-%m-%d %H:%M:%S%z') $0 $recipe $*" >> training.log
accelerate launch "${launch[@]}" -m arpo_trl "$recipe" "$@" 2>&1 | tee -ia training.log
