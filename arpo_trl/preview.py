"""`--check` and `--preview`: what a run would train on and cost, before any weight is loaded."""

import math
import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import yaml
from rich.console import Console
from rich.text import Text

from arpo_trl.batches import encode_rows
from arpo_trl.dataset import PreparedData, prepare_datasets, read_dataset, select_datasets
from arpo_trl.encoding import IGNORED
from arpo_trl.recipe import Recipe, RecipeError
from arpo_trl.template import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl.trainer.sft_config import SFTConfig

BINS = 10
BAR = 40
TRAINED, MASKED = ("bold green", "green"), ("default", "dim")


def check(recipe: Recipe) -> None:
    """Everything but training; printed to stdout.

    Raises:
        RecipeError: what would stop the run, the disk space included.
    """
    from accelerate import PartialState

    from arpo_trl.trl_config import check_environment, to_sft_config

    check_environment(recipe)
    args = to_sft_config(recipe)
    console = Console(highlight=False, soft_wrap=True, quiet=not PartialState().is_main_process)
    console.rule("recipe")
    console.print(yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True).rstrip(), markup=False)
    for notice in recipe.notices:
        console.print(notice, markup=False)
    data = prepare_datasets(recipe, load_tokenizer(recipe))
    console.rule("rows")
    for line in [*data.audit.lines(), *([] if recipe.streaming else describe_tokens(recipe, data))]:
        console.print(line, markup=False)
    console.rule("run")
    an_epoch, total = count_steps(args, count_rows(recipe, data))
    about = "about " if recipe.packing else ""
    if recipe.streaming:
        console.print(f"{total:,} steps in total; the rows are read and counted as the run goes")
    else:
        console.print(f"{about}{an_epoch:,} steps an epoch, {total:,} in total")
    needed, lines = describe_disk(recipe, args, checkpoint_steps(args, an_epoch, total))
    for line in lines:
        console.print(line, markup=False)
    free = _free_space(Path(recipe.output_dir))
    if needed > free:
        raise RecipeError(
            f"output_dir: {recipe.output_dir}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; set "
            "save_total_limit or save_only_model, or name a folder on another disk"
        )


def count_rows(recipe: Recipe, data: PreparedData) -> int:
    """Rows that the trainer sees in an epoch: as packed, an estimate; as streamed, none that are known."""
    if recipe.streaming:
        return 0
    if recipe.packing:
        return math.ceil(sum(data.audit.datasets[name].tokens for name in recipe.dataset) / recipe.cutoff_len)
    return len(data.train)


def describe_tokens(recipe: Recipe, data: PreparedData) -> list[str]:
    """Tokens a row: mean, percentiles and a histogram; and the share that carries loss."""
    batches = data.train.with_format("arrow").iter(1000)
    lengths = np.concatenate([pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches])
    trained = sum(data.audit.datasets[name].trained_tokens for name in recipe.dataset)
    tokens = sum(data.audit.datasets[name].tokens for name in recipe.dataset)
    p50, p95 = np.percentile(lengths, (50, 95))
    lines = [
        f"tokens a row: mean {lengths.mean():,.0f}, p50 {p50:,.0f}, p95 {p95:,.0f}, max {lengths.max():,}",
        f"trained: {trained:,} of {tokens:,} tokens ({trained / tokens:.1%})",
    ]
    bars, edges = np.histogram(lengths, bins=min(BINS, int(np.ptp(lengths)) + 1))
    width = len(f"{lengths.max():,}")
    for rows, low, high in zip(bars, edges, edges[1:]):
        bar = "#" * math.ceil(BAR * rows / bars.max())
        last = int(high) if high == edges[-1] else math.ceil(high) - 1
        lines.append(f"  {math.ceil(low):>{width},} to {last:>{width},}  {bar} {rows:,}")
    return lines


def count_steps(args: "SFTConfig", rows: int) -> tuple[int, int]:
    """Updates an epoch and in total, as transformers' Trainer counts them."""
    batches = math.ceil(rows / (args.per_device_train_batch_size * args.world_size))
    an_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return an_epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)


def checkpoint_steps(args: "SFTConfig", an_epoch: int, total: int) -> list[int]:
    """The steps after which a checkpoint is written; with save_strategy: steps the last step is always one."""
    if args.save_strategy == "no":
        return []
    every = an_epoch if args.save_strategy == "epoch" else args.save_steps
    every = math.ceil(every * total) if every < 1 else int(every)
    return sorted({*range(every, total + 1, every), total})


def describe_disk(recipe: Recipe, args: "SFTConfig", saved: Sequence[int]) -> tuple[int, list[str]]:
    """Bytes that the run will leave on disk, from the model's shape alone, and the lines that say so."""
    model = _shape(recipe)
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    checkpoint = weights + (0 if args.save_only_model else 2 * weights)  # AdamW keeps two moments
    kept = min(len(saved), args.save_total_limit or len(saved))
    needed = kept * checkpoint + weights
    count = sum(parameter.numel() for parameter in parameters)
    steps = ", ".join(f"{step:,}" for step in (saved if len(saved) < 9 else [*saved[:4], *saved[-1:]]))
    return needed, [
        f"{count:,} parameters, {sum(parameter.numel() for parameter in trained):,} of them trained",
        f"{len(saved)} checkpoints at steps {steps or 'none'} of {checkpoint / 1e9:.2f} GB each, {kept} kept; "
        f"{needed / 1e9:.2f} GB in all, {_free_space(Path(recipe.output_dir)) / 1e9:.2f} GB free",
    ]


def _shape(recipe: Recipe) -> Any:
    """The model on torch's meta device: shapes without weights."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from arpo_trl.model import freeze
    from arpo_trl.trl_config import model_init_kwargs, to_lora_config

    kwargs = model_init_kwargs(recipe)
    places = {key: kwargs[key] for key in ("revision", "cache_dir", "trust_remote_code")}
    try:
        config = AutoConfig.from_pretrained(recipe.model_name_or_path, **places)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=kwargs["trust_remote_code"])
            if recipe.finetuning_type == "full":
                return model.to(kwargs["dtype"])
            if recipe.finetuning_type == "freeze":
                freeze(recipe, model)
            lora = to_lora_config(recipe, model)
            return model if lora is None else get_peft_model(model, lora)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"model_name_or_path: {recipe.model_name_or_path}: no model there ({reason})") from None


def _free_space(folder: Path) -> int:
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def preview(recipe: Recipe, rows: int) -> None:
    """The first rows token by token, turn by turn: `+` and green are trained, the rest is context."""
    console = Console(highlight=False, soft_wrap=True)
    tokenizer = load_tokenizer(recipe)
    console.print("+ (green) is trained, the rest is context; each token is shaded other than its neighbours")
    for info in select_datasets(recipe):
        read = islice(read_dataset(info, recipe), rows)
        for batch in encode_rows(read, info, recipe, tokenizer):
            for finding in batch.findings:
                console.print(f"{finding['place']}: {finding['outcome']} ({finding['reason']})", markup=False)
            for row in batch.encoded.to_pylist():
                rows -= 1
                show_row(console, row, tokenizer)
        if rows <= 0:
            return


def show_row(console: Console, row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> None:
    trained = sum(label != IGNORED for label in row["labels"])
    console.rule(f"{row['source']}: {len(row['labels']):,} tokens, {trained:,} trained", align="left")
    pairs = zip(row["input_ids"], row["labels"])
    for is_trained, turn in groupby(pairs, lambda pair: pair[1] != IGNORED):
        ids = [token for token, _ in turn]
        margin, shades = ("+ ", TRAINED) if is_trained else ("  ", MASKED)
        text = Text()
        for number, piece in enumerate(_pieces(ids, tokenizer)):
            text.append(piece, shades[number % 2])
        lines = text.split("\n")
        for line in lines:
            console.print(Text(margin, shades[0]) + line)
        console.print(Text(f"{margin}^ {len(ids):,} tokens {'trained' if is_trained else 'of context'}", "italic dim"))


def _pieces(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """Each token's text; tokens that only together make a character (Chinese, emoji) come as one."""
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = str(tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
        if not text.endswith("\ufffd") or len(waiting) == 8:
            yield text
            waiting = []
    if waiting:
        yield str(tokenizer.decode(waiting))
