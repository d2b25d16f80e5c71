"""Merges a LoRA adapter into its base model, for programs that load whole models only.

    python scripts/merge_lora.py checkpoints/qwen0.5b_lora checkpoints/qwen0.5b_merged

OUT is a model folder in the base model's dtype, with the adapter's tokenizer and chat template and the base model's
generation config. The sum is taken in float32 and must predict what the adapter predicts; OUT is read back.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

TEXT = "Question: which primes lie between 10 and 20?\n<python>\nprint([11, 13, 17, 19])\n</python>\nAnswer: 答案 17."
TOLERANCE = 1e-3  # nats; float32 sums in another order differ by 1e-6 to 1e-4


def log_probs(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Of each next token of TEXT, in float32."""
    with torch.inference_mode():
        predicted = model.eval()(input_ids=input_ids).logits[0, :-1].float().log_softmax(-1)
    return predicted.gather(1, input_ids[0, 1:, None])


def merge(adapter: Path, out: Path) -> tuple[torch.dtype, float]:
    """Writes the merged model.

    Returns:
        Its dtype, and how far rounding to that dtype moved the log-probability of a token at most, in nats.

    Raises:
        SystemExit: the base model isn't there, the sum predicts something else than the adapter, or OUT does not hold
            the sum.
    """
    base_name = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    try:
        dtype = AutoConfig.from_pretrained(base_name).dtype or torch.float32
        base = AutoModelForCausalLM.from_pretrained(base_name, dtype=torch.float32)
    except (OSError, ValueError):
        sys.exit(
            f"{adapter / 'adapter_config.json'}: base_model_name_or_path: no model at {base_name!r}, looked for from "
            f"{Path.cwd()} and on the hub; run this where the training was started, or write the base model's place there"
        )
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    input_ids = tokenizer(TEXT, return_tensors="pt").input_ids

    model = PeftModel.from_pretrained(base, adapter)
    expected = log_probs(model, input_ids)
    merged = model.merge_and_unload(safe_merge=True)
    difference = float((log_probs(merged, input_ids) - expected).abs().max())
    if not difference <= TOLERANCE:  # a NaN is not
        sys.exit(
            f"merged, the model predicts otherwise than {adapter}: by {difference:.1e} nats, {TOLERANCE} is allowed"
        )

    merged.to(dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)
    weights = merged.state_dict()
    read_back = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    wrong = [name for name, tensor in read_back.state_dict().items() if not torch.equal(tensor, weights[name])]
    if wrong:
        sys.exit(f"{out}: {wrong[0]} and {len(wrong) - 1} others were not read back as they were written")
    return dtype, float((log_probs(read_back.float(), input_ids) - expected).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="the output_dir of a LoRA run")
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    args = parser.parse_args()
    for name in ("adapter_config.json", "tokenizer_config.json"):
        if not (args.adapter / name).is_file():
            sys.exit(f"{args.adapter}: no {name} here; give the output_dir of a LoRA run")
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        sys.exit(f"{args.out}: not empty; give a folder that is not there yet")
    logging.disable_progress_bar()

    dtype, moved = merge(args.adapter, args.out)
    print(f"{args.out}: predicts what the adapter does; rounding to {dtype} moved log-probabilities by {moved:.1e}")


if __name__ == "__main__":
    main()
