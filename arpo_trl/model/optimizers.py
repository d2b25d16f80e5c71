"""The optimizers that transformers does not make by name: LoRA+, Muon, Adam-mini and BAdam."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments

from ..errors import RecipeError
from ..recipe.keys import Recipe


def to_optimizer(recipe: Recipe, args: TrainingArguments) -> tuple[Any, dict[str, Any]] | None:
    """A factory of an optimizer's factory, and what the latter is told beside the model: the form that Trainer takes.

    None where `optim` alone decides.
    """
    if recipe.loraplus_lr_ratio is not None:  # https://arxiv.org/abs/2402.12354
        optimizer_cls, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        settings |= {
            "optimizer_cls": optimizer_cls,
            "loraplus_lr_ratio": recipe.loraplus_lr_ratio,
            "loraplus_lr_embedding": recipe.loraplus_lr_embedding,
            "loraplus_weight_decay": args.weight_decay,
        }
        return lambda: create_loraplus_optimizer, settings
    if recipe.use_muon:
        return lambda: MuonWithAdamW, {"args": args}
    if recipe.use_badam:
        return lambda: BlockByBlock, {"args": args, "recipe": recipe}
    return (lambda: create_adam_mini, {"args": args}) if recipe.use_adam_mini else None


def create_adam_mini(model: PreTrainedModel, args: TrainingArguments) -> torch.optim.Optimizer:
    """https://arxiv.org/abs/2406.16793"""
    config = model.config.get_text_config()
    optimizer: torch.optim.Optimizer = importlib.import_module("adam_mini").Adam_mini(
        model.named_parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        dim=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None),
        verbose=False,
    )
    return optimizer


class ProjectionsOnResume(TrainerCallback):
    """GaLore's and APOLLO's projections go on from optimizer.pt, where they are objects of their packages.

    torch.load refuses such objects unless it is told of them, and optimizers leave them on the CPU.
    """

    def __init__(self, optim: str) -> None:
        for kind, module in (("galore", "galore_torch.adamw"), ("apollo", "apollo_torch.apollo")):
            if kind in optim:
                names = vars(importlib.import_module(module))
                torch.serialization.add_safe_globals([names[name] for name in names if name.endswith("Projector")])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: Any) -> None:
        for weight, kept in kwargs["optimizer"].state.items():
            if projector := kept.get("projector"):
                projector.ortho_matrix = send_to_device(projector.ortho_matrix, weight.device)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside the blocks and AdamW for the rest, in one optimizer with one state, as LLaMA-Factory's."""

    def __init__(self, model: torch.nn.Module, args: TrainingArguments) -> None:
        inner: list[torch.nn.Parameter] = []
        outer: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
                (inner if is_inner else outer).append(parameter)
        lr, decay, betas = args.learning_rate, args.weight_decay, (args.adam_beta1, args.adam_beta2)
        self.parts: list[torch.optim.Optimizer] = []
        if inner:
            self.parts.append(torch.optim.Muon(inner, lr, decay, adjust_lr_fn="match_rms_adamw"))
        if outer:
            self.parts.append(torch.optim.AdamW(outer, lr, betas, args.adam_epsilon, decay))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]
            part.step()


class BlockByBlock(torch.optim.Optimizer):
    """BAdam (https://arxiv.org/abs/2404.02827), with all of its state: BAdam 1.4 saves that of the block's AdamW alone.

    Its own groups say which weights there are and how fast they learn; which of them step, its `blocks` decide.
    """

    def __init__(self, model: torch.nn.Module, args: TrainingArguments, recipe: Recipe) -> None:
        optimizer_cls, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        adamw = optimizer_cls(model.parameters(), weight_decay=args.weight_decay, **settings)
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):  # a resume trains another block
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
        self.blocks.param_groups = self.param_groups  # its learning rate
        for weight in self.blocks.param_idx2lp.values():
            if weight.grad is None:  # a router's bias (Ernie 4.5, AFMoE): BAdam 1.4 wants a gradient of each weight
                weight.grad = torch.zeros_like(weight)
        self.blocks.step()

    def state_dict(self) -> dict[str, Any]:
        """Beside the groups: the block (`active_param_prefixs`), the one after it, and what the block has in float32."""
        blocks, names = self.blocks, "global_step active_param_prefixs current_block_idx block_order"
        return super().state_dict() | {
            "place": {name: getattr(blocks, name, None) for name in names.split()},
            "weights": [weight.detach() for weight in blocks.param_idx2hp.values()],
            "adamw": blocks.base_optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "place" not in state_dict:
            raise RecipeError("use_badam: the checkpoint has no block to go on with; name a new output_dir")
        super().load_state_dict(state_dict)
        vars(self.blocks).update(state_dict["place"])
        self.blocks._switch_trainable_params_single_gpu(0)
        self.blocks.base_optimizer.load_state_dict(state_dict["adamw"])
        with torch.no_grad():
            for weight, saved in zip(self.blocks.param_idx2hp.values(), state_dict["weights"], strict=True):
                weight.copy_(saved)
