"""How a launch splits the model over its processes: DDP, FSDP or DeepSpeed ZeRO, by the recipe or the Accelerate config."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.integrations import deepspeed
from trl.trainer.sft_config import SFTConfig

from ..recipe.keys import Recipe

FSDP_CONFLICTS = ("use_galore", "use_apollo", "use_adam_mini")
"""Optimizers whose state is not sharded with the weights."""
Engine = Literal["DDP", "FSDP", "FSDP2", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"]


class Split(NamedTuple):
    """How the model is split.

    Attributes:
        engine: DDP, also of one process: each has the complete model and the complete optimizer state.
        details: The parts in CPU memory or on a disk, and whether each process saves its shard (SHARDED_STATE_DICT).
    """

    engine: Engine
    details: str = ""

    @property
    def is_zero(self) -> bool:
        """Return whether DeepSpeed trains the model."""
        return self.engine.startswith("ZeRO")

    @property
    def is_fsdp(self) -> bool:
        """Return whether FSDP shards the model."""
        return self.engine.startswith("FSDP")

    @property
    def shards_weights(self) -> bool:
        """Return whether no process has the complete weights."""
        return self.is_fsdp or self.engine == "ZeRO-3"

    @property
    def saves_together(self) -> bool:
        """Return whether the processes exchange weights while they save a checkpoint."""
        return self.is_fsdp or self.is_zero

    def __str__(self) -> str:
        return f"{self.engine} ({self.details})" if self.details else self.engine


def find_split(recipe: Recipe) -> Split:
    """Return how the launch splits the model. Call it after `to_sft_config`, which reads DeepSpeed's config."""
    if config := deepspeed.deepspeed_config():
        zero: dict[str, Any] = config.get("zero_optimization") or {}
        parts = {"optimizer": "offload_optimizer", "parameters": "offload_param"}
        offloaded = [name for name, key in parts.items() if (zero.get(key) or {}).get("device", "none") != "none"]
        stage: Any = f"ZeRO-{zero.get('stage', 0)}"
        return Split(stage, f"offload of {', '.join(offloaded)}" if offloaded else "")
    if requests_fsdp(recipe) and PartialState().distributed_type not in ("NO", "MULTI_CPU"):
        fsdp = fsdp_config(recipe)
        details = ["offload of parameters"] * (str(fsdp.get("cpu_offload")).lower() == "true")
        details += ["SHARDED_STATE_DICT"] * ("SHARDED" in str(fsdp.get("state_dict_type")))
        return Split("FSDP2" if str(fsdp["version"]) == "2" else "FSDP", ", ".join(details))
    return Split("DDP")  # on CPUs also for FSDP, as Accelerate 1.15 replaces it


def saves_zero3_model() -> bool:
    """Return whether DeepSpeed's config allows to gather ZeRO-3's weights in a save."""
    zero = (deepspeed.deepspeed_config() or {}).get("zero_optimization") or {}
    return bool(zero.get("stage3_gather_16bit_weights_on_model_save", False))


def conflicting_precision(args: TrainingArguments) -> str | None:
    """Return where DeepSpeed's config and the recipe differ in precision, which transformers finds after the data."""
    config = deepspeed.deepspeed_config() or {}
    for key in ("bf16", "fp16"):
        enabled = (config.get(key) or {}).get("enabled", "auto")
        requested = getattr(args, key) or getattr(args, f"{key}_full_eval")
        if enabled != "auto" and bool(enabled) != requested:
            values = [str(bool(value)).lower() for value in (enabled, requested)]
            return f"its config has {key}.enabled: {values[0]}, but the recipe's {key} is {values[1]}; set it to auto"
    return None


def float32_masters(model: nn.Module, dtype_of: Callable[[str], torch.dtype]) -> dict[str, Tensor]:
    """Return DeepSpeed's float32 copies of the trained half-precision weights that are saved in float32.

    All processes have to call it; the main one gets the weights. `dtype_of`: the dtype of a weight's file, by its name.
    """
    from deepspeed.utils import safe_get_full_fp32_param  # not above: an optional package

    masters = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dtype != torch.float32 == dtype_of(name):
            master = safe_get_full_fp32_param(weight)
            if master is not None and PartialState().is_main_process:
                masters[name] = master.cpu()
    return masters


@contextlib.contextmanager
def without_zero3() -> Iterator[None]:
    """Build a model of complete parameters. Under ZeRO-3, transformers 5.24 splits every model that is built."""
    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


def requests_fsdp(recipe: Recipe) -> bool:
    """Return whether the recipe or the launcher requests FSDP, for training: FSDP does not prepare a model without it."""
    return recipe.do_train and (bool(recipe.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true")


def uses_deepspeed(recipe: Recipe) -> bool:
    """Return whether DeepSpeed splits the model, as the recipe or the launcher requests. Needs no `to_sft_config`.

    DeepSpeed can't prepare a model without training it, except with ZeRO-3, which can't generate.
    """
    if not recipe.deepspeed and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return False
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    config = read_settings(recipe.deepspeed or (None if path == "none" else path))
    stage: Any = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)
    if config:
        stage = (config.get("zero_optimization") or {}).get("stage", 0)
    return recipe.do_train or (str(stage) == "3" and not (recipe.do_predict or recipe.predict_during_eval))


def fsdp_config(recipe: Recipe) -> dict[str, Any]:
    """Return FSDP's settings under the names of `fsdp_config` without their prefix: the recipe's, or the launcher's."""
    if not recipe.fsdp:
        names = ("state_dict_type", "cpu_ram_efficient_loading")
        launched = {name: os.environ.get(f"FSDP_{name.upper()}") for name in names}
        launched["cpu_offload"] = os.environ.get("FSDP_OFFLOAD_PARAMS")
        return launched | {"version": os.environ.get("FSDP_VERSION") or "1"}
    named = {name.removeprefix("fsdp_"): value for name, value in read_settings(recipe.fsdp_config).items()}
    return {"version": 2, "cpu_offload": "offload" in recipe.fsdp.split()} | named


def read_settings(settings: object) -> dict[str, Any]:
    """Return settings that are a mapping, or the path of a JSON file with one; empty if they are neither."""
    if isinstance(settings, str):
        settings = json.loads(Path(settings).read_text(encoding="utf-8"))
    return settings if isinstance(settings, dict) else {}


def check_buffers(recipe: Recipe, split: Split, model: nn.Module) -> None:
    """Raise RecipeError for saved buffers (GLM-4.5's router biases) that Accelerate 1.15 takes for sharded tensors."""
    loads_once = str(fsdp_config(recipe).get("cpu_ram_efficient_loading")).lower() == "true"
    if split.engine != "FSDP2" or not loads_once:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if buffer := next((name for name in model.state_dict() if name not in parameters), None):
        problem = f"{buffer} is a buffer, which FSDP2 can't send from one process to the others"
        raise recipe.error("model_name_or_path", f"{problem}; set fsdp_cpu_ram_efficient_loading: false")


def unsupported_by_fsdp(recipe: Recipe, args: SFTConfig, split: Split) -> Iterator[tuple[str, str]]:
    """Yield the optimizers and modules that compute or save what is not a sharded tensor."""
    key = next((name for name in FSDP_CONFLICTS if getattr(recipe, name)), "optim")
    optim = args.optim.value if hasattr(args.optim, "value") else str(args.optim)
    if key != "optim" or any(word in optim for word in ("adafactor", "8bit", "paged", "galore", "apollo")):
        what = optim if key == "optim" else "its optimizer"
        yield (
            key,
            f"{what} is not supported with {split.engine}; set optim: adamw_torch, or launch with accelerate_configs/zero2.yaml",
        )
    embeddings = [name for name in recipe.additional_target if "embed" in name or name == "wte"]
    if embeddings:
        problem = f"{embeddings[0]} is not supported with {split.engine}; launch with accelerate_configs/zero3.yaml"
        yield "additional_target", problem
