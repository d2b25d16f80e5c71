"""Rules between keys: values that conflict with each other, and keys that set other keys."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping

from . import methods, preference
from .keys import PredictKeys, Recipe
from .llamafactory import TOKENIZERS_OWN


def resolve(recipe: Recipe, rollout: bool = False) -> Recipe:
    """Set the keys that depend on other keys or on this machine, and collect the notices to print."""
    sampled = any(is_set(recipe, key) for key in ("temperature", "top_p", "top_k"))
    trackers = recipe.report_to + ["swanlab"] * (recipe.use_swanlab and not {"swanlab", "all"} & {*recipe.report_to})
    packing = recipe.packing or recipe.neat_packing
    predict = recipe.do_predict or recipe.predict_with_generate
    resolved = recipe.model_copy(
        update={
            "dataset": list(dict.fromkeys(recipe.dataset)),
            "eval_dataset": list(dict.fromkeys(recipe.eval_dataset)),
            "lora_alpha": recipe.lora_alpha or 2 * recipe.lora_rank,
            "warmup_ratio": 0.0 if recipe.warmup_steps else recipe.warmup_ratio,
            "gradient_checkpointing": not recipe.disable_gradient_checkpointing and recipe.gradient_checkpointing,
            "packing": packing,
            "neat_packing": packing,
            "report_to": [name for name in trackers if name != "wandb" or not wandb_is_disabled()],
            "flash_attn": "sdpa" if _missing_kernel(recipe) else recipe.flash_attn,
            "preflight": False if methods.layerwise_key(recipe) else recipe.preflight,  # or auto
            "do_predict": predict,
            "predict_with_generate": predict,
            "do_sample": sampled if recipe.do_sample is None else recipe.do_sample,
        }
    )
    notices = [*recipe.notices, *(f"{recipe.path}: {line}" for line in _notices(recipe, resolved, rollout))]
    if not recipe.do_train and not rollout:
        uses = ["evaluated"] * recipe.do_eval + ["used to generate replies"] * predict
        notices.insert(0, f"{recipe.path}: do_train is not true; the model is only {' and '.join(uses)}")
    return resolved.model_copy(update={"notices": notices})


def _missing_kernel(recipe: Recipe) -> str | None:
    kernel = {"fa2": "flash_attn", "fa3": "flash_attn_interface"}.get(recipe.flash_attn)
    return kernel if kernel and importlib.util.find_spec(kernel) is None else None


def _notices(recipe: Recipe, resolved: Recipe, rollout: bool) -> Iterator[str]:
    for key, names in (("dataset", recipe.dataset), ("eval_dataset", recipe.eval_dataset)):
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            yield f"{key}: {name} is listed {names.count(name)} times and used once, as in LLaMA-Factory"
    if recipe.warmup_steps and recipe.warmup_ratio:
        yield "warmup_ratio: ignored; warmup_steps overrides it"
    if recipe.packing and not recipe.neat_packing:
        yield "packing: packed conversations do not attend to each other, as with neat_packing: true"
    if (recipe.preprocessing_num_workers or 1) > 1 and not recipe.packing:
        yield "preprocessing_num_workers: ignored without packing; encoding uses all cores anyway"
    if kernel := _missing_kernel(recipe):
        yield f"flash_attn: {recipe.flash_attn} requires the package {kernel}, which is not installed; using sdpa"
    if "wandb" in recipe.report_to and wandb_is_disabled():
        yield "report_to: wandb is ignored, because WANDB_DISABLED is set"
    if recipe.template in TOKENIZERS_OWN:
        yield f"template: {recipe.template} is not shipped; using the tokenizer's own template"
    defaults = {key: field.default for key, field in PredictKeys.model_fields.items() if "predict" not in key}
    unused = [key for key, default in defaults.items() if getattr(recipe, key) not in (default, False)]
    if unused and not (resolved.do_predict or recipe.predict_during_eval or rollout):
        yield f"{', '.join(unused)}: ignored unless do_predict or predict_during_eval is set"
    yield from preference.notices(recipe)
    if recipe.pure_bf16:
        yield "pure_bf16: bfloat16 has 8 bits of precision; at small learning rates most updates are rounded to zero"
    yield from methods.notices(recipe)


def changed_keys(resolved: Mapping[str, object]) -> dict[str, object]:
    """Return the keys of `Recipe.resolved()` whose values differ from their defaults."""
    defaults = resolve(Recipe(model_name_or_path="-", output_dir="-")).resolved()
    return {key: value for key, value in resolved.items() if value != defaults.get(key)}


def wandb_is_disabled() -> bool:
    """Read a variable that LLaMA-Factory's users set and transformers 5 no longer reads."""
    return os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")


def conflicts(recipe: Recipe, rollout: bool = False) -> Iterator[tuple[str, str]]:
    """Yield each key that conflicts with others, with the problem and its fix."""
    training_only = ("do_train", "dataset") if rollout else ()
    yield from ((key, fix) for key, is_wrong, fix in RULES if key not in training_only and is_wrong(recipe))
    use_eval_rows = ("do_eval", "eval_strategy", "eval_on_start", "do_predict", "predict_with_generate")
    keys = [key for key in use_eval_rows if getattr(recipe, key) not in (False, "no")]
    if keys and not recipe.val_size and not recipe.eval_dataset:
        yield keys[0], "no evaluation rows; set eval_dataset or val_size"
    if recipe.val_size > 1 and recipe.val_size % 1:
        yield "val_size", f"expected a fraction or an integer, found {recipe.val_size:g}"
    metric = (recipe.metric_for_best_model or "loss").removeprefix("eval_")
    if (
        recipe.stage == "sft"
        and not metric.endswith(METRICS)
        and not (recipe.predict_during_eval and metric.startswith("predict_"))
    ):
        known = f"{', '.join(METRICS)}, or predict_<score> with predict_during_eval"
        yield "metric_for_best_model", f"expected {known}, found {metric}"
    shares = recipe.interleave_probs or []
    if shares and len(shares) != len(datasets := dict.fromkeys(recipe.dataset)):
        yield "interleave_probs", f"expected one value per dataset ({len(datasets)}), found {len(shares)}"
    elif shares and (min(shares) < 0 or abs(sum(shares) - 1) > 1e-8):  # numpy's tolerance
        yield "interleave_probs", f"expected values that sum to 1, found {', '.join(f'{share:g}' for share in shares)}"
    # LLaMA-Factory trains an adapter if finetuning_type is omitted; a recipe that relies on it must not train all weights.
    for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target"):
        if is_set(recipe, key) and not is_set(recipe, "finetuning_type"):
            yield key, "requires finetuning_type: lora, which is not the default here"
    yield from preference.find_conflicts(recipe)
    yield from methods.find_conflicts(recipe)


def is_set(recipe: Recipe, key: str) -> bool:
    """Return whether the recipe sets the key, even to its default."""
    return key in recipe.model_fields_set


def _has_no_best(recipe: Recipe) -> bool:
    return recipe.eval_strategy == "no" or not (recipe.load_best_model_at_end or recipe.metric_for_best_model)


METRICS = ("loss", "perplexity", "entropy", "mean_token_accuracy")
"""Metrics of an evaluation, also as `<dataset>_loss` for each of several datasets."""
_REQUIRES_BEST = "requires eval_strategy, and load_best_model_at_end or metric_for_best_model"

# The key to report, the condition that is true when it is wrong, and the problem with its fix. One rule per line.
# fmt: off
RULES: list[tuple[str, Callable[[Recipe], object], str]] = [
    ("do_train", lambda r: not r.do_train and not r.do_eval and not r.do_predict and not r.predict_with_generate, "nothing to do; set do_train: true"),
    ("dataset", lambda r: r.do_train and not r.dataset, "required for training; set a name in dataset_info.json"),
    ("val_size", lambda r: r.val_size and not r.dataset, "requires dataset, whose rows are held out"),
    ("val_size", lambda r: r.val_size and r.eval_dataset, "eval_dataset is set too; keep one"),
    ("val_size", lambda r: r.streaming and 0 < r.val_size < 1, "expected a number of rows with streaming, found a fraction"),
    ("predict_during_eval", lambda r: r.predict_during_eval and not r.do_eval and r.eval_strategy == "no", "requires do_eval, or eval_strategy: steps or epoch"),
    ("load_best_model_at_end", lambda r: r.load_best_model_at_end and r.eval_strategy == "no", "requires eval_strategy: steps or epoch"),
    ("early_stopping_steps", lambda r: r.early_stopping_steps and _has_no_best(r), _REQUIRES_BEST),
    ("save_strategy", lambda r: r.save_strategy == "best" and _has_no_best(r), f"best {_REQUIRES_BEST}"),
    ("interleave_probs", lambda r: r.interleave_probs and r.mix_strategy == "concat", "requires mix_strategy: interleave_under, interleave_over or interleave_once"),
    ("streaming", lambda r: r.streaming and r.max_steps <= 0, "requires max_steps, because the number of rows is unknown"),
    ("max_samples", lambda r: r.streaming and r.max_samples, "not supported with streaming; use max_steps"),
    ("packing", lambda r: r.streaming and (r.packing or r.neat_packing), "not supported with streaming; remove one"),
    ("mask_history", lambda r: r.mask_history and r.train_on_prompt, "train_on_prompt is set too; keep one"),
    ("bf16", lambda r: r.bf16 and r.fp16, "fp16 is set too; keep one"),
    ("force_bf16", lambda r: r.force_bf16 and not r.bf16, "requires bf16: true"),
    ("pure_bf16", lambda r: r.pure_bf16 and r.fp16, "fp16 is set too; keep one"),
    ("disable_gradient_checkpointing", lambda r: r.disable_gradient_checkpointing and is_set(r, "gradient_checkpointing") and r.gradient_checkpointing, "gradient_checkpointing is set too; keep one"),
    ("global_batch_size", lambda r: r.global_batch_size and r.gradient_accumulation_steps != 1, "gradient_accumulation_steps is set too; keep one"),
    ("group_by_length", lambda r: r.group_by_length and r.disable_shuffling, "disable_shuffling is set too; keep one"),
    ("train_sampling_strategy", lambda r: is_set(r, "train_sampling_strategy") and (r.group_by_length or r.disable_shuffling), "group_by_length or disable_shuffling is set too; keep one"),
    ("lora_target", lambda r: r.trains_adapter and not r.lora_target, "expected all or names of modules, found ''"),
    ("dataloader_prefetch_factor", lambda r: r.trl.get("dataloader_prefetch_factor") == 0, "expected an integer > 0, found 0"),
    ("create_new_adapter", lambda r: r.create_new_adapter and not r.adapter_name_or_path, "requires adapter_name_or_path"),
    ("use_rslora", lambda r: r.use_rslora and r.finetuning_type != "lora", "requires finetuning_type: lora"),
    ("use_dora", lambda r: r.use_dora and r.finetuning_type != "lora", "requires finetuning_type: lora"),
    ("adapter_name_or_path", lambda r: r.adapter_name_or_path and not r.trains_adapter, "requires finetuning_type: lora (or oft)"),
]
# fmt: on
