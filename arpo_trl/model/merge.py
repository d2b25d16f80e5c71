"""`arpo-trl merge ADAPTER OUTPUT`: an adapter and its base as one model."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.trainer_utils import align_special_tokens
from transformers.utils import logging

from ..data.saved_folder import check_folder
from ..data.serving_rows import read_rows, write_rows
from ..errors import RecipeError, RunFailed, in_one_line
from ..machine import missing_space
from ..report.manifest import find_manifest
from ..report.model_card import write_model_card
from ..run_folder import match_umask
from .base import base_of, load_weights, runs_code
from .base_files import BaseFiles, read_base_files
from .methods.quantized import dequantized, require_mergeable

TEXT = "Question: which primes lie between 10 and 20?\n<python>\nprint([11, 13, 17, 19])\n</python>\nAnswer: 答案 17."
TOLERANCE = 1e-3
"""Nats by which the merged model may differ; rounding in float32 causes 1e-6 to 1e-4."""


class Merged(NamedTuple):
    """`mean` and `most`: nats by which rounding to `dtype` changed the log-probability of a token of TEXT."""

    dtype: torch.dtype
    mean: float
    most: float


def merge_command(args: argparse.Namespace) -> str:
    """Merge, and return what to print. `args`: from `merge_arguments`."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    merged = merge(args.adapter, args.output, args.dtype, args.trust_remote_code)
    name = str(merged.dtype).removeprefix("torch.")
    line = f"{args.output}: predicts what the adapter predicts, apart from rounding: {name} changes a token's log-probability"
    line += f" by {merged.mean:.1e} on average and {merged.most:.1e} at most"
    if merged.most > TOLERANCE:
        line += "; --dtype float32 avoids that, in a larger model"
    return "\n".join([line, *check_folder(args.output)])


def merge(adapter: Path, output: Path, dtype_name: str | None = None, trust_remote_code: bool = False) -> Merged:
    """Write the merged model into an empty or new folder. `dtype_name`: of all tensors, instead of the base's.

    Raises:
        RecipeError: the base model can't be loaded or merged.
        RunFailed: the merged model predicts something else than the adapter, or `output` is too small or incomplete.
    """
    base, base_files = _load_base(adapter, trust_remote_code)
    dtype: torch.dtype | None = getattr(torch, dtype_name) if dtype_name else None
    if dtype:
        base_files = base_files._replace(dtype=dtype, others={})
    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code)
    input_ids: Tensor = tokenizer(TEXT, return_tensors="pt").input_ids

    model = PeftModel.from_pretrained(base, str(adapter))
    expected = _log_probs(model, input_ids)
    merged = model.merge_and_unload(safe_merge=True)
    difference = float((_log_probs(merged, input_ids) - expected).abs().max())
    if not difference <= TOLERANCE:  # true for NaN, too
        raise RunFailed(
            f"{adapter}: the merged model's log-probabilities differ by {difference:.1e} nats (at most {TOLERANCE} allowed)"
        )

    if (adapter / "generation_config.json").is_file():  # has all tokens at which the run's replies end
        merged.generation_config = GenerationConfig.from_pretrained(adapter)
    align_special_tokens(merged, tokenizer)
    base_files.cast(merged)
    needed = sum(weight.nbytes for weight in merged.parameters())
    if full := missing_space(output, needed, "the merged model"):
        raise RunFailed(f"{output}: {full}")
    merged.save_pretrained(output)
    base_files.restore_configs(output, dtype)
    tokenizer.save_pretrained(output)
    match_umask(output)
    if manifest := find_manifest(adapter):  # for `chat`, which reads where results go, and as the model's origin
        if manifest.status == "finished" and (adapter / "all_results.json").is_file():
            write_model_card(adapter, manifest, output)
        manifest.write(output, "finished")
    if rows := read_rows(adapter) or read_rows(adapter.parent):  # those of a checkpoint are in the folder above
        write_rows(rows, output)
    weights = merged.state_dict()
    trusted = runs_code(output, str(output), trust_remote_code)
    config = AutoConfig.from_pretrained(output, trust_remote_code=trusted)
    saved = load_weights(output, config, dtype=torch.float32, trust_remote_code=trusted)
    wrong = [name for name, tensor in saved.state_dict().items() if not torch.equal(tensor, weights[name].to(tensor))]
    if wrong:
        raise RunFailed(f"{output}: {wrong[0]} and {len(wrong) - 1} other weights differ from what was written")
    moved = (_log_probs(saved, input_ids) - expected).abs()
    if not moved.isfinite().all():
        name = str(base_files.dtype).removeprefix("torch.")
        raise RunFailed(
            f"{output}: {name} cannot hold the merged weights: log-probabilities are not numbers. Merge into another folder with "
            "--dtype float32 or bfloat16"
        )
    return Merged(base_files.dtype, float(moved.mean()), float(moved.max()))


def _load_base(adapter: Path, trust_remote_code: bool) -> tuple[PreTrainedModel, BaseFiles]:
    """Return the adapter's base in float32, and what the merged model keeps of its files."""
    name = base_of(adapter)
    trusted = runs_code(adapter, name, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
        require_mergeable(config, adapter)
        base = load_weights(name, config, dtype=torch.float32, trust_remote_code=trusted, **dequantized(config))
        return base, read_base_files(name, base)
    except OSError:
        raise RecipeError(
            f"{adapter / 'adapter_config.json'}: base_model_name_or_path: no model {name!r} in {Path.cwd()} or on the hub. "
            "Run this in the folder where the training was started, or correct the path in that file"
        ) from None
    except ValueError as error:
        raise RecipeError(f"{name} can't be loaded ({in_one_line(error)})") from None


def _log_probs(model: torch.nn.Module, input_ids: Tensor) -> Tensor:
    """Return the log-probability of each next token of TEXT, in float32."""
    with torch.inference_mode():
        predicted = model.eval()(input_ids=input_ids).logits[0, :-1].float().log_softmax(-1)
    log_probs: Tensor = predicted.gather(1, input_ids[0, 1:, None])
    return log_probs
