"""The messages of a run that fails in a step: the batch, its rows, and what to change."""

from collections.abc import Iterable

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import Trainer

from .loss import Batch, row_starts


def describe_out_of_memory(trainer: Trainer, batch: str) -> str:
    """Return the batch that did not fit, and the keys to change, those that cost least first."""
    args, fixes = trainer.args, []
    if batch.startswith("evaluation"):
        fixes.append("lower per_device_eval_batch_size (same result)")
    else:
        if args.per_device_train_batch_size > 1:
            keep = "raise gradient_accumulation_steps, or set global_batch_size: same result"
            fixes.append(f"lower per_device_train_batch_size ({keep})")
        if not args.activation_checkpointing:
            fixes.append("gradient_checkpointing: true (slower, same result)")
    fixes.append("lower cutoff_len (truncates rows)")
    if not hasattr(trainer.model, "peft_config"):
        fixes.append("finetuning_type: lora")
    return (
        f"step {trainer.state.global_step + 1}: out of memory on {trainer.accelerator.device} with a "
        f"{batch or 'model of this size'}. Try in this order: {'; '.join(fixes)}"
    )


def describe_not_finite(model: nn.Module, what: str, value: float, sources: list[str]) -> str:
    """Return the rows of the step (`sources`), and the first weight that is not finite, if any."""
    weight = next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)
    cause = (
        f"The model itself is broken: its weight {weight} is not finite"
        if weight
        else "Lower learning_rate, use bf16 instead of fp16, or check these rows"
    )
    return (
        f"the {what} is {value}; nothing of this step was saved. "
        f"Rows in its batch: {', '.join(sources) or 'unknown'}. {cause}"
    )


def find_sources(rows: Dataset | IterableDataset, batches: list[Batch]) -> list[str]:
    """Return `file:line` of each row in the batches, found among `rows` by its tokens; a stream would have to be read again.

    A collator that keeps `source` next to the tensors does not get it: trl 1.16 packs input_ids and labels alone
    (https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py#L1472), and accelerate 1.15 can't
    send text from the process that reads a stream to the others.
    """
    if not isinstance(rows, Dataset) or "source" not in rows.column_names:
        return []
    failed = {tuple(row) for batch in batches for row in _split_rows(batch)}
    if "seq_lengths" in rows.column_names:  # pairs: two rows of the batch are one of `rows`
        sides = [list(_split_rows(batch)) for batch in batches]
        failed = {(*chosen, *rejected) for batch in sides for chosen, rejected in zip(batch[::2], batch[1::2])}
    known = rows.select_columns(["input_ids", "source"])
    return [row["source"] for row in known if tuple(row["input_ids"]) in failed]


def _split_rows(batch: Batch) -> Iterable[list[int]]:
    """Return the token ids of each row in a batch: padded (attention_mask) or padding-free (position_ids)."""
    ids = batch["input_ids"].cpu()
    if "attention_mask" in batch:
        return [row[mask.bool()].tolist() for row, mask in zip(ids, batch["attention_mask"].cpu(), strict=True)]
    return [row.tolist() for row in ids[0].tensor_split(row_starts(batch)[1:])]
