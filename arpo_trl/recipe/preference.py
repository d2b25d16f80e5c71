"""The keys of `stage: dpo`, and the rules that connect them with other keys."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator

from ..errors import RecipeError
from .types import Location, Locations, Number, key
from .yaml_file import Setting, shorten

LOSSES = ("sigmoid", "hinge", "ipo", "orpo", "simpo")

_Recipe = Any
"""`Recipe` inherits from the class below, so its name can't be imported here."""


def _known_loss(value: object) -> object:
    known = f"expected one of {', '.join(LOSSES)}, found {shorten(value)}"
    if value == "kto_pair":
        raise ValueError(f"{known}; LLaMA-Factory with trl 0.20 or later trains sigmoid for it")
    if isinstance(value, str) and value not in LOSSES:
        raise ValueError(f"{known}, which LLaMA-Factory trains as sigmoid without a warning")
    return value


def read_old_stage(settings: dict[str, Setting]) -> str | None:
    """Turn `stage: orpo` of LLaMA-Factory 0.6.2 to 0.7.1 into `stage: dpo` with `pref_loss: orpo`, and return a notice."""
    stage = settings.get("stage")
    if stage is None or stage.value != "orpo":
        return None
    settings["stage"] = stage._replace(value="dpo")
    settings.setdefault("pref_loss", stage._replace(value="orpo"))
    return "stage: orpo means stage: dpo with pref_loss: orpo"


# One key per line.
# fmt: off
class PreferenceKeys(BaseModel):
    pref_beta: Number = key(0.1, "DPO: how closely the model is held to the reference; scale of the rewards", gt=0)
    pref_loss: Annotated[Literal["sigmoid", "hinge", "ipo", "orpo", "simpo"], BeforeValidator(_known_loss)] = key("sigmoid", "DPO: the preference loss. orpo and simpo need no reference")
    simpo_gamma: Number = key(0.5, "SimPO: target margin between the two sides' rewards", ge=0)
    pref_ftx: Number = key(0.0, "DPO: weight of the SFT loss on the chosen sides", ge=0)
    dpo_label_smoothing: Number = key(0.0, "DPO: share of pairs assumed to be swapped (conservative DPO); sigmoid only", ge=0, le=0.5)
    ld_alpha: Number | None = key(None, "LD-DPO: weight of the tokens past the shorter side's length; 1 or omitted is plain DPO", ge=0, le=1)
    ref_model: Location | None = key(None, "DPO: the reference, a hub id or a folder. If omitted, the model before training")
    ref_model_adapters: Locations = key([], "DPO: LoRA adapters of ref_model, separated by commas")
    precompute_ref_log_probs: bool = key(False, "DPO: compute the reference's log-probabilities once before training, to save memory")
    pair_all_answers: bool = key(False, "Lists of more than two answers (best first): pair the first with each other answer, not only the second")
# fmt: on


def needs_reference(recipe: _Recipe) -> bool:
    """Return whether the loss compares with a reference model."""
    return recipe.stage == "dpo" and recipe.pref_loss not in ("orpo", "simpo")


def keeps_base(recipe: _Recipe) -> bool:
    """Return whether the policy without its adapter is the reference, or its base with `ref_model_adapters` is."""
    if not recipe.trains_adapter:
        return False
    is_unmerged_base = names_base(recipe) and not recipe.adapters_to_merge and len(recipe.ref_model_adapters) <= 1
    return is_unmerged_base or recipe.ref_model is None


def names_base(recipe: _Recipe) -> bool:
    """Return whether `ref_model` is `model_name_or_path`."""
    reference, base = recipe.ref_model, recipe.model_name_or_path
    if reference is None or reference == base:
        return reference is not None
    return Path(reference).is_dir() and Path(base).is_dir() and Path(reference).samefile(base)


def is_base(recipe: _Recipe) -> bool:
    """Return whether the reference is the model before training, without any adapter."""
    return names_base(recipe) and not recipe.ref_model_adapters and not recipe.adapter_name_or_path


def unmergeable(recipe: _Recipe, base: str) -> RecipeError:
    """Return the error for an adapter that can't be merged into the base, with what to do."""
    adapter, instead = recipe.adapters_to_merge[0], compare_with_adapter(recipe)
    fix = f"merge it first (arpo-trl merge {adapter} OUT) and set model_name_or_path: OUT{instead}"
    error: RecipeError = recipe.error("adapter_name_or_path", f"{adapter} can't be merged into {base}; {fix}")
    return error


def compare_with_adapter(recipe: _Recipe) -> str:
    """Return how to compare with the last adapter without merging it, if `create_new_adapter` was to do that."""
    if not (needs_reference(recipe) and recipe.create_new_adapter):
        return ""
    base, adapter = recipe.model_name_or_path, recipe.adapter_name_or_path[-1]
    keys = f"create_new_adapter: false, ref_model: {base}, ref_model_adapters: {adapter}"
    return f"; or compare with it unmerged: {keys}"


METRICS = "rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected".split()
"""Of a training step, and with the prefix eval_ of an evaluation."""

_PREDICT = "not supported with stage: dpo. To predict, use a recipe with stage: sft and the trained model"
_TOKENS = "not supported with stage: dpo, whose loss is over pairs. Remove the line"
_NOT_SUPPORTED = {
    "packing": "not supported with stage: dpo (in LLaMA-Factory it only lowers cutoff_len by 1). Remove the line",
    "neat_packing": "not supported with stage: dpo. Remove the line; padding_free: true avoids padding",
    "streaming": "not supported with stage: dpo. Remove the line",
    "train_on_prompt": "not supported with stage: dpo, where chosen and rejected share the prompt. Remove the line",
    "mask_history": "not supported with stage: dpo, which never trains on the earlier replies in the prompt. Remove the line",
    "do_predict": _PREDICT,
    "predict_with_generate": _PREDICT,
    "predict_during_eval": _PREDICT,
    "use_dft_loss": _TOKENS,
    "use_eaft_loss": _TOKENS,
    "use_asft_loss": _TOKENS,
    "label_smoothing_factor": "not supported with stage: dpo. Write dpo_label_smoothing",
    "neftune_noise_alpha": "not supported with stage: dpo, whose reference has no noise. Remove the line",
}


def find_conflicts(recipe: _Recipe) -> Iterator[tuple[str, str]]:
    """Yield each key that conflicts with others, with the problem and its fix."""
    fields = PreferenceKeys.model_fields
    if recipe.stage != "dpo":
        for name in fields:
            if getattr(recipe, name) not in (fields[name].default, None, []):
                yield name, "requires stage: dpo"
        return
    for name, why in _NOT_SUPPORTED.items():
        if getattr(recipe, name, None):
            yield name, why
    metric = (recipe.metric_for_best_model or "loss").removeprefix("eval_")
    if not metric.endswith(("loss", *METRICS)):
        yield "metric_for_best_model", f"expected loss, {', '.join(METRICS)}; found {metric}"
    if getattr(recipe, "pissa_init", False) and needs_reference(recipe):
        yield "pissa_init", "changes the base model, which is also the DPO reference. Remove the line"
    if recipe.dpo_label_smoothing and recipe.pref_loss != "sigmoid":
        yield "dpo_label_smoothing", f"requires pref_loss: sigmoid, found {recipe.pref_loss}"
    if recipe.ref_model_adapters and not recipe.ref_model:
        yield "ref_model_adapters", "requires ref_model, the base of these adapters"
    if recipe.precompute_ref_log_probs and not needs_reference(recipe):
        yield (
            "precompute_ref_log_probs",
            f"not used by pref_loss: {recipe.pref_loss}, which has no reference model. Remove the line",
        )
    if not recipe.do_train and needs_reference(recipe) and not recipe.ref_model:
        yield "ref_model", "required to evaluate without training: the model is compared with it"


def notices(recipe: _Recipe) -> Iterator[str]:
    """Yield what a user of LLaMA-Factory should know of these keys."""
    if recipe.stage != "dpo":
        return
    if recipe.pref_loss in ("hinge", "ipo"):
        yield f"pref_loss: {recipe.pref_loss} is used; LLaMA-Factory with trl 0.20 or later uses sigmoid instead"
    if recipe.ref_model and not needs_reference(recipe):
        yield f"ref_model is ignored: pref_loss: {recipe.pref_loss} has no reference"
    for name in ("lora_dropout", "module_dropout"):
        if getattr(recipe, name, 0):
            yield f"{name} is ignored: stage: dpo trains without dropout, as LLaMA-Factory does"
    if recipe.pref_loss == "simpo" and "pref_beta" not in recipe.model_fields_set:
        margin = recipe.simpo_gamma / recipe.pref_beta
        yield f"pref_beta is {recipe.pref_beta:g}: SimPO usually takes 2 to 10 (simpo_gamma / pref_beta is a margin of {margin:g})"
