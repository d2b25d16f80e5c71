"""Build what the run will build, before rows are encoded and weights loaded: what a library rejects is found in seconds."""

import copy
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..errors import RecipeError, in_one_line
from ..model.sft_config import to_sft_config
from ..model.split import find_split
from ..model.weights import Model
from ..recipe.keys import Recipe
from ..recipe.methods import OPTIMIZERS


def try_constructors(recipe: Recipe, args: SFTConfig, model: Model) -> None:
    """Build TRL's trainer with a row, and the optimizer with a weight. Skipped if the launch splits the model.

    Args:
        recipe: The recipe.
        args: Its SFTConfig.
        model: From `model_shape`, on the meta device. It is changed.

    Raises:
        RecipeError: one of them rejects a value, with the key whose default it accepts, or whose value the reason names.
    """
    if find_split(recipe).engine != "DDP":
        return
    reason = _why_rejected(recipe, args, model)
    if reason is None:
        return
    for key in recipe.trl:
        without = Recipe.model_construct(
            recipe.model_fields_set - {key}, **dict(recipe) | {key: Recipe.model_fields[key].default}
        )
        try:
            accepted = _why_rejected(without, to_sft_config(without), model) is None
        except RecipeError:
            continue
        if accepted:
            raise recipe.error(key, f"not supported: {reason}")
    for key in sorted(recipe.model_fields_set):
        values = getattr(recipe, key)
        texts = [value for value in (values if isinstance(values, list) else [values]) if isinstance(value, str)]
        if any(repr(text) in reason for text in texts):
            raise recipe.error(key, f"not supported: {reason}")
    raise RecipeError(f"{recipe.path}: not supported by TRL: {reason}")


def _why_rejected(recipe: Recipe, args: SFTConfig, model: Model) -> str | None:
    args = copy.copy(args)
    args.report_to, args.push_to_hub, args.dataset_num_proc = [], False, None
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        try:
            rows = Dataset.from_list([{"input_ids": [0, 0], "labels": [0, 0]}] * 2)
            _OnMeta(model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=_tokenizer())
            # GaLore's needs the model's modules, and some methods have their own.
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
