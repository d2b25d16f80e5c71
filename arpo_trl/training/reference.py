"""The reference model of `stage: dpo`: what it is, and its log-probabilities.

It is always built from the files that the recipe names, never from a checkpoint, so that a resumed run has the same one.
"""

import copy
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.sft_config import SFTConfig
from trl.trainer.utils import add_fused_lm_head, use_adapter

from ..errors import in_one_line
from ..model.methods.quantized import is_quantized
from ..model.model import load_model
from ..model.split import find_split
from ..model.token_scores import score_labelled_positions_only
from ..model.weights import Model
from ..recipe.keys import Recipe
from ..recipe.methods import AdvancedKeys
from ..recipe.preference import keeps_base, needs_reference
from .loss import Batch
from .preference import REFERENCE, PairScores, metric_names, score_pairs, split_rows

ADAPTER = "reference"
SAMPLED = 1 << 16
SAMPLES = 64


@dataclass
class Preference:
    """What the trainer needs to know of `stage: dpo`.

    `reference`: a frozen model; if None, the policy with the adapter ADAPTER, or without an adapter if it lacks that.
    """

    recipe: Recipe
    reference: PreTrainedModel | None

    def means(self, sums: Tensor, prefix: str) -> dict[str, float]:
        """Return the mean over pairs of each metric and of the loss, from the sums of `PairScores.rows`."""
        *values, pairs = sums.tolist()
        names = [*metric_names(self.recipe), "loss"]
        return {f"{prefix}_{name}": value / max(pairs, 1) for name, value in zip(names, values, strict=True)}

    def score(
        self, model: nn.Module, batch: Batch, accelerator: Accelerator, with_aux_loss: bool = False
    ) -> tuple[PairScores, Tensor | None]:
        """Compare policy and reference on a batch. Returns the balancing loss of a mixture of experts too, if asked."""
        # The reference first: the trainer's forward hook keeps the last pass.
        reference = self.sum_reference(model, batch, accelerator) if needs_reference(self.recipe) else None
        inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != REFERENCE}
        if with_aux_loss:
            inputs["output_router_logits"] = True
        output = model(**inputs, use_cache=False, fused_lm_head=True)
        return score_pairs(*split_rows(output, batch), reference, self.recipe), output.aux_loss

    @torch.no_grad()
    def sum_reference(self, policy: nn.Module, batch: Batch, accelerator: Accelerator) -> Tensor:
        """Return the reference's log-probability of each side, shape (2 * pairs,): stored in the batch, or computed."""
        if REFERENCE in batch:
            return batch[REFERENCE]
        unwrapped = accelerator.unwrap_model(policy)
        model, selected = policy, accelerator.autocast()
        if self.reference is None:
            selected = use_adapter(unwrapped, ADAPTER if ADAPTER in unwrapped.peft_config else None)
        elif self.reference is not unwrapped:
            model = self.reference
        with selected:
            log_probs, mask = split_rows(model(**batch, use_cache=False, fused_lm_head=True), batch)
        return (log_probs * mask).sum(-1)


def make_preference(recipe: Recipe, args: SFTConfig, model: Model) -> Preference | None:
    """Return the recipe's preference loss, None for another stage; `model`, the policy, loses its dropout."""
    if recipe.stage != "dpo":
        return None
    disable_dropout(model)  # before it is copied
    made = Preference(recipe, make_reference(recipe, args, model))
    disable_dropout(model)  # of an adapter that the reference added
    return made


def make_reference(recipe: Recipe, args: SFTConfig, model: Model) -> PreTrainedModel | None:
    """Return the reference; None if the loss has none, or if it is `model`, the policy, with another adapter or without.

    Raises:
        RecipeError: the reference can't be loaded, or does not fit a launch that splits models.
    """
    if not needs_reference(recipe):
        return None
    if isinstance(model, PeftModel) and keeps_base(recipe):
        if recipe.ref_model_adapters:
            _add_adapter(recipe, model)
        return None
    if precomputes(recipe) and not recipe.ref_model:
        return cast(PreTrainedModel, model)  # the policy itself, before its first step
    if find_split(recipe).shards_weights:
        what = "a second complete model on each process is not supported with FSDP or ZeRO-3"
        raise recipe.error("ref_model", f"{what}. Launch with accelerate_configs/multi_gpu.yaml")
    other = load_model(to_reference_recipe(recipe))[0] if recipe.ref_model else copy.deepcopy(model)
    if isinstance(other, PeftModel):
        other = cast(PreTrainedModel, other.merge_and_unload(safe_merge=True))
    return _freeze(other, args)


def precomputes(recipe: Recipe) -> bool:
    """Return whether the reference's log-probabilities are computed before training: also if models are split."""
    alone = needs_reference(recipe) and not keeps_base(recipe) and not recipe.ref_model
    return recipe.precompute_ref_log_probs or (alone and find_split(recipe).shards_weights)


def to_reference_recipe(recipe: Recipe) -> Recipe:
    """Return a recipe of which `load_model` loads the model that `ref_model` and `ref_model_adapters` name."""
    changes = AdvancedKeys().model_dump()  # no rare method
    changes |= {"model_name_or_path": recipe.ref_model, "do_train": False, "create_new_adapter": False}
    if recipe.ref_model_adapters:
        changes |= {"adapter_name_or_path": recipe.ref_model_adapters, "finetuning_type": "lora"}
    else:
        changes |= {"adapter_name_or_path": [], "finetuning_type": "full"}
    if recipe.ref_model != recipe.model_name_or_path:
        changes["model_revision"] = "main"
    return recipe.model_copy(update=changes)


def _add_adapter(recipe: Recipe, model: PeftModel) -> None:
    """Add `ref_model_adapters` to the policy as a frozen second adapter, which is never saved."""
    (adapter,) = recipe.ref_model_adapters
    try:
        model.load_adapter(
            adapter, ADAPTER, is_trainable=False, revision=recipe.model_revision, cache_dir=recipe.cache_dir
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise recipe.error("ref_model_adapters", f"{adapter} could not be loaded: {in_one_line(error)}") from error
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])  # type: ignore[method-assign]


def _freeze(model: PreTrainedModel, args: SFTConfig) -> PreTrainedModel:
    """Freeze a model on its device, in the dtype that linear layers compute in. It returns log-probabilities of labels.

    Autocast casts their weights anyway, so a copy of the policy gives the same bits, with half the memory. Norms,
    embeddings and the head stay as they are.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    head = model.get_output_embeddings()
    for module in model.modules():
        if dtype and type(module) is nn.Linear and module is not head:
            module.to(dtype)
    model.requires_grad_(False)
    model.eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as of the policy, for equal bits
    if args.device.type not in ("cuda", "xpu"):
        score_labelled_positions_only(model)
    nn.Module.to(model, args.device)
    return model


def disable_dropout(model: nn.Module) -> None:
    """Switch every dropout off, LoRA's included: the policy is compared with a reference that has none."""
    for module in model.modules():
        if "Dropout" in type(module).__name__ and hasattr(module, "p"):
            module.p = 0.0  # type: ignore[assignment]
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def describe_reference(recipe: Recipe) -> dict[str, Any] | None:
    """Return what run.json records of the reference: its path, adapters, and a hash of its files."""
    if not needs_reference(recipe):
        return None
    adapters = recipe.ref_model_adapters
    if recipe.ref_model is None:
        # of several adapters all but the last are merged; create_new_adapter merges them all
        adapters = recipe.adapter_name_or_path[: None if recipe.create_new_adapter else -1]
    path = recipe.ref_model or recipe.model_name_or_path
    return {"path": path, "adapters": adapters, "hash": _hash_files([path, *adapters])}


def _hash_files(names: list[str]) -> str:
    """Hash the weight files of folders by name, size and evenly spaced samples; a hub id by its name."""
    digest = hashlib.sha256()
    for name in names:
        files = sorted(Path(name).glob("*.safetensors")) + sorted(Path(name).glob("*.bin"))
        digest.update(name.encode() if not files else b"")
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as data:
                for at in range(SAMPLES):
                    data.seek(max(size - SAMPLED, 0) * at // (SAMPLES - 1))
                    digest.update(data.read(SAMPLED))
    return digest.hexdigest()


def report_reference(recipe: Recipe) -> list[str]:
    """Return what the reference is, as the start report prints it, and how to have another one."""
    about = describe_reference(recipe)
    if about is None:
        return []
    with_adapters = f" with {', '.join(about['adapters'])}" if about["adapters"] else ""
    lines = [f"reference  {about['path']}{with_adapters}, {_describe_place(recipe)}"]
    if recipe.ref_model is None and recipe.adapter_name_or_path and not recipe.create_new_adapter:
        can_merge = not (find_split(recipe).shards_weights or is_quantized(recipe))
        lines.append(
            f"           without {recipe.adapter_name_or_path[-1]}, as in LLaMA-Factory. To compare with it, set "
            f"{'create_new_adapter: true, or ' * can_merge}ref_model and ref_model_adapters"
        )
    return lines


def _describe_place(recipe: Recipe) -> str:
    if precomputes(recipe):
        return "its log-probabilities are computed before training"
    if not keeps_base(recipe):
        return "a second model in memory"
    return "a second adapter of the model" if recipe.ref_model_adapters else "the model with its adapter switched off"
