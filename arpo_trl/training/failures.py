"""What a run says that ends in a step: the batch, its rows, and what to change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .loss import Batch, row_starts

if TYPE_CHECKING:
    from .trainer import ArpoTrainer


def describe_out_of_memory(trainer: ArpoTrainer) -> str:
    """The batch that did not fit, and the keys to change, the cheapest first."""
    args, ways = trainer.args, []
    if trainer.last_batch.startswith("evaluation"):
        ways.append("per_device_eval_batch_size (same run)")
    else:
        if args.per_device_train_batch_size > 1:
            keep = "raise gradient_accumulation_steps, or keep global_batch_size: same run"
            ways.append(f"per_device_train_batch_size ({keep})")
        if not args.activation_checkpointing:
            ways.append("gradient_checkpointing: true (slower, same run)")
    ways.append("cutoff_len (rows are cut)")
    if not hasattr(trainer.model, "peft_config"):
        ways.append("finetuning_type: lora")
    return (
        f"step {trainer.state.global_step + 1}: out of memory on {trainer.accelerator.device} with a "
        f"{trainer.last_batch or 'model of this size'}. In order of what it costs, change: {'; '.join(ways)}"
    )


def describe_not_finite(trainer: ArpoTrainer, what: str, value: float) -> str:
    """The step and its rows; a broken model by its weight."""
    weight = next((name for name, p in trainer.model.named_parameters() if not p.isfinite().all()), None)
    cause = (
        f"The model itself is broken: its weight {weight} is not finite"
        if weight
        else "Lower learning_rate, use bf16 instead of fp16, or look at these rows"
    )
    return (
        f"step {trainer.state.global_step + 1}: the {what} is {value}; nothing of this step was saved. "
        f"Rows in its batch: {', '.join(find_sources(trainer)) or 'unknown'}. {cause}"
    )


def find_sources(trainer: ArpoTrainer) -> list[str]:
    """`file:line` of each row in the batches of this step, found by its tokens in all rows that are trained on.

    A collator that keeps `source` beside the tensors does not get it: trl 1.16 packs input_ids and labels alone
    (https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py#L1472), and accelerate 1.15 can't
    send text from the process that reads a stream to the others.
    """
    if trainer.rows is None or "source" not in trainer.rows.column_names:
        return []
    wanted = {tuple(row) for batch in trainer.batches for row in _split_rows(batch)}
    rows = trainer.rows.select_columns(["input_ids", "source"])
    return [row["source"] for row in rows if tuple(row["input_ids"]) in wanted]


def _split_rows(batch: Batch) -> Iterable[list[int]]:
    """The token ids of each row in a batch: padded (with an attention mask) or laid end to end (position_ids)."""
    ids = batch["input_ids"].cpu()
    if "attention_mask" in batch:
        return [row[mask.bool()].tolist() for row, mask in zip(ids, batch["attention_mask"].cpu(), strict=True)]
    starts = row_starts(batch)
    return [ids[0, a:b].tolist() for a, b in zip(starts, [*starts[1:], ids.size(1)], strict=True)]
