"""BAdam: train one block of layers at a time. https://arxiv.org/abs/2404.02827"""

import contextlib
import importlib
import re
import warnings
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from trl.trainer.sft_config import SFTConfig

from ...errors import RecipeError
from ...recipe.keys import Recipe
from ..optimizer_settings import read_settings
from ..weights import Model
from .method import Keywords, Method, Parts


class Badam(Method):
    def from_pretrained(self, kwargs: Keywords, config: PreTrainedConfig) -> Keywords:
        """Load the weights in their file's dtype: BAdam keeps the block that it trains in float32."""
        return kwargs if self.recipe.pure_bf16 else kwargs | {"dtype": "auto"}

    def prepare_base(self, model: PreTrainedModel) -> None:
        """Train the first block, which needs the most memory. The optimizer switches to the next ones."""
        weights = [(re.match(r".*layers\.[^.]*\.", name), weight) for name, weight in model.named_parameters()]
        blocks = list(dict.fromkeys(match[0] for match, _ in weights if match))
        if not blocks:
            problem = f"{model.config.model_type} has no blocks named layers; remove the line"
            raise self.recipe.error("use_badam", problem)
        if (start := self.recipe.badam_start_block or 0) >= len(blocks):
            raise self.recipe.error("badam_start_block", f"expected a block of 0 to {len(blocks) - 1}, found {start}")
        for match, weight in weights:
            weight.requires_grad = match is not None and match[0] == blocks[0]
        if self.recipe.use_reentrant_gc:
            model.enable_input_require_grads()  # a reentrant checkpoint has no gradient where its input has none

    def memory(self, parts: Parts, model: Model, args: SFTConfig) -> Parts:
        """In float32: the block, its gradient and its two moments."""
        return {"optimizer": 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)}

    def trainer_kwargs(self, model: Model, args: SFTConfig) -> Keywords:
        return {"optimizer_cls_and_kwargs": (lambda: BlockOptimizer, {"args": args, "recipe": self.recipe})}


class BlockOptimizer(torch.optim.Optimizer):
    """BAdam's optimizer, with its complete state: BAdam 1.4 saves only that of the block's AdamW.

    `param_groups` has all weights and their learning rates; `blocks`, BAdam's own optimizer, decides which are updated.
    """

    def __init__(self, model: torch.nn.Module, args: TrainingArguments, recipe: Recipe) -> None:
        optimizer_cls, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        adamw = optimizer_cls(model.parameters(), weight_decay=args.weight_decay, **settings)
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):  # a resumed run trains another block
            warnings.simplefilter("ignore")  # it names every weight that is float32
            self.blocks = importlib.import_module("badam").BlockOptimizer(
                adamw,
                list(model.named_parameters()),
                switch_block_every=recipe.badam_switch_interval,
                start_block=recipe.badam_start_block,
                switch_mode=recipe.badam_switch_mode,
            )
        super().__init__(self.blocks.param_groups, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.blocks.param_groups = self.param_groups  # their learning rate
        for weight in self.blocks.param_idx2lp.values():
            if weight.grad is None:  # BAdam 1.4 requires a gradient; a router's bias has none (Ernie 4.5, AFMoE)
                weight.grad = torch.zeros_like(weight)
        self.blocks.step()

    def state_dict(self) -> dict[str, Any]:
        """Add the block (`active_param_prefixs`), the next one, and the block's float32 weights and moments."""
        blocks, names = self.blocks, "global_step active_param_prefixs current_block_idx block_order"
        return super().state_dict() | {
            "place": {name: getattr(blocks, name, None) for name in names.split()},
            "weights": [weight.detach() for weight in blocks.param_idx2hp.values()],
            "adamw": blocks.base_optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "place" not in state_dict:
            raise RecipeError("use_badam: the checkpoint was saved with another optimizer; set a new output_dir")
        super().load_state_dict(state_dict)
        vars(self.blocks).update(state_dict["place"])
        self.blocks._switch_trainable_params_single_gpu(0)
        settings = read_settings(self.blocks.base_optimizer)
        self.blocks.base_optimizer.load_state_dict(state_dict["adamw"])
        for group, fresh in zip(self.blocks.base_optimizer.param_groups, settings, strict=True):
            group.update(fresh)
        with torch.no_grad():
            for weight, saved in zip(self.blocks.param_idx2hp.values(), state_dict["weights"], strict=True):
                weight.copy_(saved)
