"""The checks of a recipe that need torch, and the rows of a run: all that precedes loading the weights.

requirements.py has the checks that need no torch.
"""

import os
import tempfile

import pyarrow.compute as pc
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, Trainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..data.audit import token_lengths
from ..data.prepare import PreparedData, prepare_datasets
from ..data.tokenizer import load_template
from ..errors import RecipeError, in_one_line
from ..model.base import load_config
from ..model.memory import model_shape
from ..model.methods.chosen import methods_of
from ..model.sft_config import to_sft_config
from ..model.split import (
    Split,
    check_buffers,
    conflicting_precision,
    find_split,
    saves_zero3_model,
    unsupported_by_fsdp,
)
from ..model.weights import Model
from ..recipe.keys import Recipe
from ..recipe.methods import OPTIMIZERS
from ..report.manifest import run_day
from .requirements import raise_problems

RESIZE = "resize the model once (model.resize_token_embeddings(len(tokenizer))), save it and the tokenizer, and use that folder"


def check_after_torch(recipe: Recipe) -> SFTConfig:
    """Check device, launch and the model's config.json. Return the trainer's arguments.

    Raises:
        RecipeError: what is not supported, with the key's line and the fix.
    """
    check_device(recipe)
    if recipe.do_train and recipe.deepspeed and "WORLD_SIZE" not in os.environ:
        what = "needs a launcher, even for one process; start with `torchrun --nproc_per_node N -m arpo_trl`"
        raise recipe.error("deepspeed", f"{what} or accelerate launch")
    args = to_sft_config(recipe)
    split = find_split(recipe)
    if recipe.do_train:
        check_split(recipe, args, split)
    config = load_config(recipe).get_text_config()
    for method in methods_of(recipe):
        method.check_config(config, args)
    model = model_shape(recipe)
    check_buffers(recipe, split, model)
    try_constructors(recipe, model)
    return args


def check_split(recipe: Recipe, args: SFTConfig, split: Split) -> None:
    """Raise RecipeError for all that is not supported with the way in which the launch splits the model."""
    problems: list[tuple[str, str]] = []
    if recipe.fsdp and args.world_size == 1:
        fix = "start them with accelerate launch, or remove the line"
        problems.append(("fsdp", f"splitting a model needs several processes; {fix}"))
    if split.saves_together and recipe.on_save_error == "continue":
        reason = "whose processes exchange weights during a save"
        problems.append(("on_save_error", f"continue is not supported with {split.engine}, {reason}; set stop"))
    if split.engine == "ZeRO-3" and not recipe.trains_adapter and not saves_zero3_model():
        fix = "set it to true (zero3_save_16bit_model: true in an Accelerate config)"
        problem = "stage3_gather_16bit_weights_on_model_save is false: no final model can be saved"
        problems.append(("deepspeed", f"{problem}; {fix}"))
    key = "do_predict" if recipe.do_predict else "predict_during_eval" if recipe.predict_during_eval else None
    if key and split.shards_weights:
        reason = "generation needs the complete model on each process"
        overrides = f"do_train=false do_predict=true model_name_or_path={recipe.output_dir}"
        fix = f"Remove the key and, after training, run the recipe on one process with {overrides}"
        problems.append((key, f"not supported with {split.engine}: {reason}. {fix}"))
    if split.is_zero and (conflict := conflicting_precision(args)):
        problems.append(("deepspeed", conflict))
    if split.is_fsdp:
        problems += unsupported_by_fsdp(recipe, args, split)
    raise_problems(recipe, problems)


def check_device(recipe: Recipe) -> None:
    """Raise RecipeError for all that the recipe needs and this machine's device lacks."""
    problems = []
    if not torch.accelerator.is_available():
        needed = [key for key in ("activation_offloading", "tf32") if getattr(recipe, key)]
        problems += [(key, "needs a GPU; remove the line") for key in needed]
        if recipe.flash_attn == "flex" and recipe.do_train:
            problems.append(("flash_attn", "flex attention can't train on a CPU; set flash_attn: sdpa"))
    if recipe.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append(("bf16", "this GPU has no bfloat16; set bf16: false (fp16: true is faster)"))
    raise_problems(recipe, problems)


def load_rows(recipe: Recipe, args: SFTConfig) -> PreparedData:
    """Load the tokenizer and its template, prepare the datasets, and check that their rows fit the batches and the model.

    Raises:
        RecipeError: the rows do not fill a batch, or the model has no embedding for a token. Streams are not checked.
    """
    data = prepare_datasets(recipe, load_template(recipe, run_day(recipe)))
    rows, batch = data.train, args.per_device_train_batch_size * args.world_size
    is_counted = isinstance(rows, Dataset) and recipe.do_train and not recipe.packing
    if is_counted and args.dataloader_drop_last and len(rows) < batch:
        raise recipe.error(
            "dataloader_drop_last",
            f"drops all {len(rows):,} rows, fewer than a batch of {batch:,}; remove the line, or lower "
            "per_device_train_batch_size",
        )
    config = load_config(recipe).get_text_config()
    if size := getattr(config, "vocab_size", None):
        _check_tokens(recipe, data, size)
    _check_positions(recipe, data, config)
    return data


def _check_tokens(recipe: Recipe, data: PreparedData, size: int) -> None:
    tokenizer = data.template.tokenizer
    beyond = (tokenizer.pad_token_id, "padding") if (tokenizer.pad_token_id or 0) >= size else None
    for rows in (data.train, *data.eval.values()):
        if beyond is None and isinstance(rows, Dataset):
            beyond = _find_token_beyond(rows, size)
    if beyond:
        token, where = beyond
        raise recipe.error(
            "model_name_or_path",
            f"{recipe.model_name_or_path} has embeddings for token ids 0 to {size - 1:,}, but {where} has token id {token:,} "
            f"({tokenizer.convert_ids_to_tokens(token)!r}); {RESIZE}",
        )


def _check_positions(recipe: Recipe, data: PreparedData, config: PreTrainedConfig) -> None:
    """Raise RecipeError for a row that is longer than a model's learned positions (GPT-2, OPT).

    Rotary models compute positions beyond max_position_embeddings, and are not limited.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        return
    for rows in (data.train, *data.eval.values()):
        if not isinstance(rows, Dataset) or not len(rows):
            continue
        lengths = token_lengths(rows)
        longest = int(lengths.argmax())
        if lengths[longest] > limit and _learns_positions(model_shape(recipe), limit):
            raise recipe.error(
                "cutoff_len",
                f"{config.model_type} has {limit:,} learned positions, but {rows[longest]['source']} has "
                f"{lengths[longest]:,} tokens; set cutoff_len: {limit}",
            )


def _learns_positions(model: nn.Module, limit: int) -> bool:
    """Return whether the model has an embedding of positions: one of `limit`, or of a few more (OPT adds 2)."""
    return any(
        isinstance(module, nn.Embedding)
        and ("pos" in name.rpartition(".")[2] or name.endswith("wpe"))
        and 0 <= module.num_embeddings - limit <= 8
        for name, module in model.named_modules()
    )


def _find_token_beyond(rows: Dataset, size: int) -> tuple[int, str] | None:
    """Return the first token id that is not below `size`, and the location of its row."""
    for batch in rows.select_columns(["input_ids", "source"]).with_format("arrow").iter(1000):
        most = pc.max(pc.list_flatten(batch["input_ids"])).as_py()
        if most is not None and most >= size:
            located = zip(batch["input_ids"].to_pylist(), batch["source"].to_pylist())
            return next((max(ids), source) for ids, source in located if ids and max(ids) >= size)
    return None


# --- trial constructors ---


def try_constructors(recipe: Recipe, model: Model) -> None:
    """Build TRL's trainer with a row, and the optimizer with a weight: what a library rejects is found in seconds.

    Skipped if the launch splits the model.
    `model`: from `model_shape`, on the meta device; it is changed.

    Raises:
        RecipeError: one of them rejects a value, with the key whose default it accepts, or whose value the reason names.
    """
    if find_split(recipe).engine != "DDP":
        return
    reason = _why_rejected(recipe, model)
    if reason is None:
        return
    for key in recipe.trl:
        without = Recipe.model_construct(
            recipe.model_fields_set - {key}, **dict(recipe) | {key: Recipe.model_fields[key].default}
        )
        if _why_rejected(without, model) is None:
            raise recipe.error(key, f"not supported: {reason}")
    for key in sorted(recipe.model_fields_set):
        values = getattr(recipe, key)
        texts = [value for value in (values if isinstance(values, list) else [values]) if isinstance(value, str)]
        if any(repr(text) in reason for text in texts):
            raise recipe.error(key, f"not supported: {reason}")
    raise RecipeError(f"{recipe.path}: not supported by TRL: {reason}")


def _why_rejected(recipe: Recipe, model: Model) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            args = to_sft_config(recipe)
            args.report_to, args.push_to_hub, args.dataset_num_proc, args.output_dir = [], False, None, folder
            rows = Dataset.from_list([{"input_ids": [0, 0], "labels": [0, 0]}] * 2)
            _OnMeta(model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=_tokenizer())
            # Some need the model's modules, and some methods have their own.
            if not (args.optim_target_modules or any(getattr(recipe, key) for key in OPTIMIZERS)):
                optimizer_cls, settings = Trainer.get_optimizer_cls_and_kwargs(args)
                optimizer_cls([nn.Parameter(torch.zeros(2, 2))], weight_decay=args.weight_decay, **settings)
        except Exception as error:  # libraries raise many types
            return in_one_line(error)
    return None


class _OnMeta(SFTTrainer):
    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave the model on the meta device, which has no data to move."""


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a", pad_token="a")
