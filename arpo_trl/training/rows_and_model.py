"""Whether rows, model and batch go together, before any weight is loaded."""

from __future__ import annotations

import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig

from ..data.prepare import PreparedData
from ..model.base_config import load_config
from ..model.methods.chosen import methods_of
from ..recipe.keys import Recipe

_RESIZE = "resize the model once (model.resize_token_embeddings(len(tokenizer))), save both and name that folder"


def check_fit(recipe: Recipe, args: SFTConfig, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse rows that fill no batch, and tokens that the model has no embedding for. Streams are not looked at.

    Raises:
        RecipeError: with the key's line, and the row.
    """
    rows, at_once = data.train, args.per_device_train_batch_size * args.world_size
    counted = isinstance(rows, Dataset) and recipe.do_train and not recipe.packing
    if counted and args.dataloader_drop_last and len(rows) < at_once:
        what = f"drops every row: {len(rows):,} are fewer than the {at_once:,} of one batch; remove the line"
        raise recipe.error("dataloader_drop_last", f"{what}, or lower per_device_train_batch_size")
    config = load_config(recipe).get_text_config()
    for method in methods_of(recipe):
        method.check_config(config, args)
    size = getattr(config, "vocab_size", None)
    if size is None:
        return
    found = [(tokenizer.pad_token_id, "padding")] if (tokenizer.pad_token_id or 0) >= size else []
    for dataset in (rows, *data.eval.values()):
        if not found and isinstance(dataset, Dataset):
            found = _beyond(dataset, size)
    for token, where in found:
        what = f"{recipe.model_name_or_path} has embeddings for {size:,} tokens, and {where} has token {token:,}"
        name = tokenizer.convert_ids_to_tokens(token)
        raise recipe.error("model_name_or_path", f"{what} ({name!r}); {_RESIZE}")


def _beyond(rows: Dataset, size: int) -> list[tuple[int, str]]:
    """The first token id that is not below `size`, and the location of its row; nothing if there is none."""
    for batch in rows.select_columns(["input_ids", "source"]).with_format("arrow").iter(1000):
        most = pc.max(pc.list_flatten(batch["input_ids"])).as_py()
        if most is not None and most >= size:
            rows_of_batch = zip(batch["input_ids"].to_pylist(), batch["source"].to_pylist())
            return [(max(ids), source) for ids, source in rows_of_batch if max(ids) >= size][:1]
    return []
