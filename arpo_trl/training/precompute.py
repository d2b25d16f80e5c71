"""`precompute_ref_log_probs`: the reference's log-probabilities of every pair, computed once and kept in the run's folder."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset

from ..errors import RecipeError
from ..processes import on_main_process
from ..recipe.keys import Recipe
from ..report.console import say
from ..run_folder import replace
from .preference import PairCollator, pair_key
from .reference import Preference, describe_reference
from .trainer import ArpoTrainer

FILE = "reference_log_probs.npz"
Stored = dict[bytes, tuple[float, float]]


def use_stored_log_probs(recipe: Recipe, trainer: ArpoTrainer) -> None:
    """Give the trainer's batches the reference's log-probabilities, and drop the reference model.

    Read from the run's folder if they were computed from the same reference, tokens and precision, else computed.

    Raises:
        RecipeError: they are missing, and the policy, which is the reference, was trained already.
    """
    preference, collator = trainer.preference, trainer.data_collator
    assert preference and isinstance(collator, PairCollator)
    path = Path(recipe.output_dir) / FILE
    evals = trainer.eval_dataset or {}
    datasets = [trainer.train_dataset, *(evals.values() if isinstance(evals, dict) else [evals])]
    key = _key(recipe, trainer, datasets)
    stored = on_main_process(lambda: _read(path, key))
    if stored is None:
        if trainer.state.global_step:
            raise RecipeError(
                f"{path}: missing, or computed from other data; the reference can't be computed from a checkpoint"
            )
        stored = _compute(trainer, preference, datasets)
        on_main_process(lambda: _write(path, key, stored))
        say(f"reference  log-probabilities of {len(stored):,} pairs computed and saved to {path}")
    else:
        say(f"reference  log-probabilities of {len(stored):,} pairs read from {path}")
    collator.reference_log_probs = stored
    preference.reference = None


def _key(recipe: Recipe, trainer: ArpoTrainer, datasets: list[Dataset]) -> str:
    """Hash all that the log-probabilities depend on."""
    digest = hashlib.sha256()
    precision = [trainer.args.bf16, trainer.args.fp16, recipe.pure_bf16, recipe.quantization_bit, recipe.flash_attn]
    digest.update(json.dumps([describe_reference(recipe), precision], sort_keys=True, default=str).encode())
    for dataset in datasets:
        for pair in dataset.select_columns(["input_ids", "labels", "seq_lengths"]):
            digest.update(np.asarray([*pair["seq_lengths"], *pair["labels"]], np.int32).tobytes())
            digest.update(pair_key(pair))
    return digest.hexdigest()


def _compute(trainer: ArpoTrainer, preference: Preference, datasets: list[Dataset]) -> Stored:
    """Compute the pairs of all datasets, a part on each process, the longest first."""
    args, accelerator = trainer.args, trainer.accelerator
    columns = [dataset.select_columns(["input_ids", "labels", "seq_lengths"]) for dataset in datasets]
    different = {pair_key(pair): pair for dataset in columns for pair in dataset}
    pairs = sorted(different.values(), key=lambda pair: -max(pair["seq_lengths"]))
    sums = torch.zeros(len(pairs), 2, device=args.device)
    size, world = args.per_device_train_batch_size, args.world_size
    trainer.model.eval()
    for start in range(0, len(pairs), size * world):
        mine = slice(start + args.process_index, start + size * world, world)
        # Each process takes part in each round: FSDP and ZeRO-3 gather weights together.
        batch = send_to_device(trainer.data_collator(pairs[mine] or pairs[:1]), args.device)
        scores = preference.sum_reference(trainer.model_wrapped, batch, accelerator).view(-1, 2)
        if pairs[mine]:
            sums[mine] = scores
    sums = accelerator.reduce(sums)
    return {pair_key(pair): (values[0], values[1]) for pair, values in zip(pairs, sums.tolist(), strict=True)}


def _read(path: Path, key: str) -> Stored | None:
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            if str(file["key"]) != key:
                return None
            keys, sums = file["pairs"], file["sums"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return None
    return {row_key.tobytes(): (values[0], values[1]) for row_key, values in zip(keys, sums.tolist(), strict=True)}


def _write(path: Path, key: str, stored: Stored) -> None:
    pairs = np.frombuffer(b"".join(stored), np.uint8).reshape(len(stored), -1)
    temporary = path.with_name(f"{path.stem}.tmp.npz")
    np.savez(temporary, key=np.str_(key), pairs=pairs, sums=np.array(list(stored.values()), np.float32))
    replace(temporary, path)
