"""What keys decide about each other: those that are right alone and wrong together, and those that settle others."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

from . import methods
from .keys import PredictKeys, Recipe
from .llamafactory import TOKENIZERS_OWN


def resolve(recipe: Recipe) -> Recipe:
    """Settle what keys decide about each other, and what this machine can't do but may do otherwise."""
    sampled = any(given(recipe, key) for key in ("temperature", "top_p", "top_k"))
    packing = recipe.packing or recipe.neat_packing
    predict = recipe.do_predict or recipe.predict_with_generate
    settled = recipe.model_copy(
        update={
            "lora_alpha": recipe.lora_alpha or 2 * recipe.lora_rank,
            "warmup_ratio": 0.0 if recipe.warmup_steps else recipe.warmup_ratio,
            "gradient_checkpointing": not recipe.disable_gradient_checkpointing and recipe.gradient_checkpointing,
            "packing": packing,
            "neat_packing": packing,
            "report_to": _trackers(recipe),
            "flash_attn": "sdpa" if _missing_kernel(recipe) else recipe.flash_attn,
            "preflight": False if methods.layerwise_key(recipe) else recipe.preflight,  # or auto
            "do_predict": predict,
            "predict_with_generate": predict,
            "do_sample": sampled if recipe.do_sample is None else recipe.do_sample,
        }
    )
    notices = [*recipe.source.notices, *(f"{recipe.path}: {line}" for line in _notices(recipe, settled))]
    if not recipe.do_train:
        done = {"evaluated": recipe.do_eval, "asked to reply": predict}
        said = " and ".join(what for what, asked in done.items() if asked)
        notices.insert(0, f"{recipe.path}: do_train is not true: nothing is trained, the model is {said}")
    return settled.model_copy(update={"source": replace(recipe.source, notices=tuple(notices))})


def _trackers(recipe: Recipe) -> list[str]:
    wanted = recipe.report_to
    if recipe.use_swanlab and not {"swanlab", "all"} & {*wanted}:
        wanted = [*wanted, "swanlab"]
    return [name for name in wanted if not (name == "wandb" and wandb_is_disabled())]


def _missing_kernel(recipe: Recipe) -> str | None:
    kernel = {"fa2": "flash_attn", "fa3": "flash_attn_interface"}.get(recipe.flash_attn)
    return kernel if kernel and importlib.util.find_spec(kernel) is None else None


def _notices(recipe: Recipe, settled: Recipe) -> Iterator[str]:
    if recipe.warmup_steps and recipe.warmup_ratio:
        yield "warmup_ratio: no effect; warmup_steps is there, and wins as in transformers 4"
    if recipe.packing and not recipe.neat_packing:
        yield "packing: conversations in a packed row do not see each other (neat_packing: true)"
    if (recipe.preprocessing_num_workers or 1) > 1 and not recipe.packing:
        yield "preprocessing_num_workers is ignored unless packing is set: one process encodes rows, on all cores"
    if kernel := _missing_kernel(recipe):
        yield f"flash_attn: sdpa; {recipe.flash_attn} needs the package {kernel}, which is not installed"
    if "wandb" in recipe.report_to and wandb_is_disabled():
        yield "report_to: wandb is left out, since WANDB_DISABLED is set"
    if recipe.template in TOKENIZERS_OWN:
        yield f"template: {recipe.template} is not shipped; the tokenizer's own template is used instead"
    defaults = {key: field.default for key, field in PredictKeys.model_fields.items() if "predict" not in key}
    unused = [key for key, default in defaults.items() if getattr(recipe, key) not in (default, False)]
    if unused and not settled.do_predict and not recipe.predict_during_eval:
        yield f"{', '.join(unused)}: no effect; do_predict and predict_during_eval generate replies"
    if recipe.trust_remote_code:
        yield "trust_remote_code: the model's own code runs if transformers has none for its architecture"
    if recipe.pure_bf16:
        yield "pure_bf16: bfloat16 keeps 8 bits; at small learning rates most updates round to nothing"
    yield from methods.notices(recipe)


def wandb_is_disabled() -> bool:
    """LLaMA-Factory's users set this variable; transformers 5 no longer reads it."""
    return os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")


def conflicts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys that are right alone and wrong together, by the key whose line is named."""
    for key, wrong, why in RULES:
        if wrong(recipe):
            yield key, why
    if recipe.val_size > 1 and recipe.val_size % 1:
        yield "val_size", f"expected a share or whole rows, found {recipe.val_size:g}"
    shares = recipe.interleave_probs or []
    if shares and len(shares) != len(recipe.dataset):
        yield "interleave_probs", f"expected one share for each of {len(recipe.dataset)} datasets, found {len(shares)}"
    elif shares and (min(shares) < 0 or abs(sum(shares) - 1) > 1e-8):  # numpy's tolerance
        yield "interleave_probs", f"expected shares that sum to 1, found {', '.join(f'{share:g}' for share in shares)}"
    for key in ("loraplus_lr_ratio", "use_rslora", "use_dora"):
        if getattr(recipe, key) and recipe.finetuning_type != "lora":
            yield key, "needs finetuning_type: lora"
    # LLaMA-Factory trains an adapter when the key is omitted; a recipe that counts on that must not train every weight.
    for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target"):
        if given(recipe, key) and not given(recipe, "finetuning_type"):
            yield key, "needs finetuning_type: lora, which is not the default here"
    yield from methods.find_conflicts(recipe)  # of the rare methods


def given(recipe: Recipe, key: str) -> bool:
    """Whether the recipe has this line, rather than the key's default."""
    return key in recipe.model_fields_set


def _evaluates(recipe: Recipe) -> bool:
    return recipe.do_eval or recipe.eval_strategy != "no"


def _has_no_eval_rows(recipe: Recipe) -> bool:
    return not recipe.val_size and not recipe.eval_dataset


def _evaluates_on_nothing(recipe: Recipe) -> bool:
    return _evaluates(recipe) and _has_no_eval_rows(recipe)


def _knows_no_best(recipe: Recipe) -> bool:
    return recipe.eval_strategy == "no" or not (recipe.load_best_model_at_end or recipe.metric_for_best_model)


def _is_no_metric(recipe: Recipe) -> bool:
    """Whether metric_for_best_model names what no evaluation has: transformers would say so at the first one."""
    name = (recipe.metric_for_best_model or "loss").removeprefix("eval_")
    return not name.endswith(METRICS) and not (recipe.predict_during_eval and name.startswith("predict_"))


def _keeps_and_drops_activations(recipe: Recipe) -> bool:
    asked = given(recipe, "gradient_checkpointing") and recipe.gradient_checkpointing
    return bool(recipe.disable_gradient_checkpointing and asked)


METRICS = ("loss", "perplexity", "entropy", "mean_token_accuracy")
"""Of an evaluation, and as `<dataset>_loss` of each of several; predict_during_eval adds `predict_<score>`."""
_NEEDS_A_BEST = "needs eval_strategy, and load_best_model_at_end or metric_for_best_model"

# The key whose line is named, when it is wrong, and what to do. One rule a line.
# fmt: off
RULES: list[tuple[str, Callable[[Recipe], object], str]] = [
    ("do_train", lambda r: not r.do_train and not r.do_eval and not r.do_predict and not r.predict_with_generate, "nothing to do; set do_train: true"),
    ("dataset", lambda r: r.do_train and not r.dataset, "do_train needs at least one name of dataset_info.json"),
    ("val_size", lambda r: r.val_size and not r.dataset, "holds out rows of dataset, which names none"),
    ("val_size", lambda r: r.val_size and r.eval_dataset, "eval_dataset is there too; keep one"),
    ("val_size", lambda r: r.streaming and 0 < r.val_size < 1, "with streaming, expected a whole number of rows"),
    ("do_eval", lambda r: r.do_eval and _evaluates_on_nothing(r), "nothing to evaluate on; set eval_dataset or val_size"),
    ("eval_strategy", lambda r: not r.do_eval and _evaluates_on_nothing(r), "nothing to evaluate on; set eval_dataset or val_size"),
    ("eval_on_start", lambda r: r.eval_on_start and _has_no_eval_rows(r), "nothing to evaluate on; set eval_dataset or val_size"),
    ("do_predict", lambda r: r.do_predict and _has_no_eval_rows(r), "no rows to predict; set eval_dataset or val_size"),
    ("predict_with_generate", lambda r: r.predict_with_generate and not r.do_predict and _has_no_eval_rows(r), "no rows to predict; set eval_dataset or val_size"),
    ("predict_during_eval", lambda r: r.predict_during_eval and not _evaluates(r), "needs do_eval, or eval_strategy: steps or epoch"),
    ("load_best_model_at_end", lambda r: r.load_best_model_at_end and r.eval_strategy == "no", "needs eval_strategy: steps or epoch"),
    ("early_stopping_steps", lambda r: r.early_stopping_steps and _knows_no_best(r), _NEEDS_A_BEST),
    ("save_strategy", lambda r: r.save_strategy == "best" and _knows_no_best(r), f"best {_NEEDS_A_BEST}"),
    ("metric_for_best_model", _is_no_metric, f"no evaluation has it; expected {', '.join(METRICS)}, or predict_<score> with predict_during_eval"),
    ("interleave_probs", lambda r: r.interleave_probs and r.mix_strategy == "concat", "mix_strategy is concat; write interleave_under or interleave_over"),
    ("streaming", lambda r: r.streaming and r.max_steps <= 0, "its length is unknown; set max_steps"),
    ("max_samples", lambda r: r.streaming and r.max_samples, "does not go with streaming; set max_steps"),
    ("packing", lambda r: r.streaming and (r.packing or r.neat_packing), "does not go with streaming; remove one"),
    ("mask_history", lambda r: r.mask_history and r.train_on_prompt, "train_on_prompt asks for the opposite; keep one"),
    ("bf16", lambda r: r.bf16 and r.fp16, "fp16 is on too; keep one"),
    ("pure_bf16", lambda r: r.pure_bf16 and r.fp16, "fp16 is on too; keep one"),
    ("disable_gradient_checkpointing", _keeps_and_drops_activations, "gradient_checkpointing asks for the opposite; keep one"),
    ("global_batch_size", lambda r: r.global_batch_size and r.gradient_accumulation_steps != 1, "gradient_accumulation_steps follows from it; remove that line"),
    ("group_by_length", lambda r: r.group_by_length and r.disable_shuffling, "disable_shuffling is on too; keep one"),
    ("train_sampling_strategy", lambda r: given(r, "train_sampling_strategy") and (r.group_by_length or r.disable_shuffling), "group_by_length or disable_shuffling is on too; keep one"),
    ("create_new_adapter", lambda r: r.create_new_adapter and not r.adapter_name_or_path, "needs adapter_name_or_path"),
    ("adapter_name_or_path", lambda r: r.adapter_name_or_path and not r.trains_adapter, "needs finetuning_type: lora (or oft)"),
]
# fmt: on
