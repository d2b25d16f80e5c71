"""`arpo-trl merge ADAPTER OUTPUT`: an adapter and its base as one model. Its words: arguments.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.trainer_utils import align_special_tokens
from transformers.utils import logging

from ..data.saved_folder import check_folder
from ..data.serving_rows import read_rows, write_rows
from ..errors import RecipeError, RunFailed
from ..machine import free_space
from ..recipe.methods import QUANTIZED_PACKAGES
from ..report.manifest import find_manifest
from ..run_folder import match_umask
from .methods.quantized import dequantized

TEXT = "Question: which primes lie between 10 and 20?\n<python>\nprint([11, 13, 17, 19])\n</python>\nAnswer: 答案 17."
TOLERANCE = 1e-3
"""Nats by which the sum may predict otherwise; float32 sums in another order differ by 1e-6 to 1e-4."""


class Merged(NamedTuple):
    """`mean` and `most`: nats by which rounding to `dtype` moved the log-probability of a token of TEXT."""

    dtype: torch.dtype
    mean: float
    most: float


def merge_command(args: argparse.Namespace) -> str:
    """Merge, and return what to print. `args`: of `merge_arguments`."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    merged = merge(args.adapter, args.output, args.dtype)
    name = str(merged.dtype).removeprefix("torch.")
    line = f"{args.output}: predicts what the adapter does; {name} moves a token's log-probability"
    line += f" by {merged.mean:.1e} on average and {merged.most:.1e} at most"
    if merged.most > TOLERANCE:
        line += "; --dtype float32 keeps it, in a larger model"
    return "\n".join([line, *check_folder(args.output)])


def merge(adapter: Path, output: Path, dtype_name: str | None = None) -> Merged:
    """Write the merged model into a folder that is empty, or not there yet.

    Raises:
        RecipeError: the base model isn't there.
        RunFailed: the sum predicts something else than the adapter, or `output` has no room for it or does not hold it.
    """
    base, own_dtype = _load_base(adapter)
    dtype: torch.dtype = getattr(torch, dtype_name) if dtype_name else own_dtype
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    input_ids: Tensor = tokenizer(TEXT, return_tensors="pt").input_ids

    model = PeftModel.from_pretrained(base, str(adapter))
    expected = _log_probs(model, input_ids)
    merged = model.merge_and_unload(safe_merge=True)
    difference = float((_log_probs(merged, input_ids) - expected).abs().max())
    if not difference <= TOLERANCE:  # a NaN is not
        raise RunFailed(
            f"merged, the model predicts otherwise than {adapter}: by {difference:.1e} nats, {TOLERANCE} is allowed"
        )

    if (adapter / "generation_config.json").is_file():  # every token at which the run's replies end
        merged.generation_config = GenerationConfig.from_pretrained(adapter)
    align_special_tokens(merged, tokenizer)
    needed, free = sum(weight.nbytes for weight in merged.to(dtype).parameters()), free_space(output)
    if free < needed:
        raise RunFailed(
            f"{output}: disk full: the merged model takes {needed / 1e9:.3f} GB, and there are {free / 1e9:.3f} GB free; free "
            "some space, or give a folder on another disk"
        )
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    match_umask(output)
    if manifest := find_manifest(adapter):  # `chat` reads in it where results go, and people what made the model
        manifest.write(output, "finished")
    if rows := read_rows(adapter) or read_rows(adapter.parent):  # those of a checkpoint are in the folder above
        write_rows(rows, output)
    weights = merged.state_dict()
    read_back = AutoModelForCausalLM.from_pretrained(output, dtype=dtype)
    wrong = [name for name, tensor in read_back.state_dict().items() if not torch.equal(tensor, weights[name])]
    if wrong:
        raise RunFailed(f"{output}: {wrong[0]} and {len(wrong) - 1} others were not read back as they were written")
    moved = (_log_probs(read_back.float(), input_ids) - expected).abs()
    return Merged(dtype, float(moved.mean()), float(moved.max()))


def _load_base(adapter: Path) -> tuple[PreTrainedModel, torch.dtype]:
    """The adapter's base in float32, and the dtype of its file."""
    name = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    try:
        config = AutoConfig.from_pretrained(name)
        method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        if method in QUANTIZED_PACKAGES:
            raise RecipeError(
                f"{adapter}: its base {name} is quantized with {method.upper()}, and no adapter can be merged into it; "
                "use the two as they are, as arpo-trl chat does"
            )
        dtype = config.dtype or torch.float32
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **dequantized(config)), dtype
    except (OSError, ValueError):
        raise RecipeError(
            f"{adapter / 'adapter_config.json'}: base_model_name_or_path: no model at {name!r}, looked for from "
            f"{Path.cwd()} and on the hub; run this where the training was started, or write the base model's path there"
        ) from None


def _log_probs(model: torch.nn.Module, input_ids: Tensor) -> Tensor:
    """Of each next token of TEXT, in float32."""
    with torch.inference_mode():
        predicted = model.eval()(input_ids=input_ids).logits[0, :-1].float().log_softmax(-1)
    chosen: Tensor = predicted.gather(1, input_ids[0, 1:, None])
    return chosen
