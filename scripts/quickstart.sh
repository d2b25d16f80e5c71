#!/usr/bin/env bash
# From a fresh clone to a trained model on a CPU: install into .venv, create a tiny model, train it on the toy data,
# score its replies before and after, and ask it a question. Only the installation needs the network.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/install.sh

untrained=checkpoints/tiny_qwen2
trained=checkpoints/tiny_cpu
question="What is the remainder when 29^1234 is divided by 700?" # not in the toy data

[ -f "$untrained/tokenizer_config.json" ] || python scripts/make_tiny_model.py "$untrained"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # more don't help at this size
accelerate launch -q --config_file accelerate_configs/cpu.yaml -m arpo_trl recipes/tiny_cpu.yaml

system=$(PYTHONPATH=scripts python -c "import make_toy_dataset; print(make_toy_dataset.SYSTEM)")
echo
echo "A question to $trained: $question"
arpo-trl chat "$trained" --system "$system" --prompt "$question" --max-new-tokens 80
echo
echo "loss plot  $trained/training_loss.png"
echo "logs       $trained/trainer_log.jsonl, $trained/training.log"
echo "model      $trained"
echo "chat       .venv/bin/arpo-trl chat $trained"
