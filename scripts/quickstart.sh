#!/usr/bin/env bash
# From nothing to a trained model, on a machine with only Python: installs into .venv, makes a tiny model, trains it on
# the toy data, scores its replies before and after, and asks it a question. No GPU and no network after the install.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/install.sh

untrained=checkpoints/tiny_qwen2
trained=checkpoints/tiny_cpu
question="What is the remainder when 29^1234 is divided by 700?" # not in the toy data

[ -f "$untrained/tokenizer_config.json" ] || python scripts/make_tiny_model.py "$untrained"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}            # more don't help at this size
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # on a busy machine, threads that spin made it 8 times as slow
accelerate launch --config_file accelerate_configs/cpu.yaml -m arpo_trl recipes/tiny_cpu.yaml

system=$(PYTHONPATH=scripts python -c "import make_toy_dataset; print(make_toy_dataset.SYSTEM)")
echo
echo "$trained is asked: $question"
arpo-trl chat "$trained" --system "$system" --prompt "$question" --max-new-tokens 80
echo
echo "loss plot   $trained/training_loss.png"
echo "log         $trained/trainer_log.jsonl, $trained/training.log"
echo "model       $trained"
echo "talk to it  .venv/bin/arpo-trl chat $trained"
