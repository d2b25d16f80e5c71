"""What keys decide about each other: those that are right alone and wrong together, and those that settle others."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from .keys import Recipe


def resolve(recipe: Recipe) -> Recipe:
    """Settle what keys decide about each other, and what this machine can't do but may do otherwise."""
    say = recipe.notices.append
    settled: dict[str, Any] = {"lora_alpha": recipe.lora_alpha or 2 * recipe.lora_rank}
    if recipe.warmup_steps and recipe.warmup_ratio:
        settled["warmup_ratio"] = 0.0
        say(f"{recipe.path}: warmup_ratio: no effect; warmup_steps is there, and wins as in transformers 4")
    if recipe.disable_gradient_checkpointing:
        settled["gradient_checkpointing"] = False
    if recipe.packing and not recipe.neat_packing:
        say(f"{recipe.path}: packing: conversations in a packed row do not see each other (neat_packing: true)")
    settled["packing"] = settled["neat_packing"] = recipe.packing or recipe.neat_packing
    kernel = {"fa2": "flash_attn", "fa3": "flash_attn_interface"}.get(recipe.flash_attn)
    if kernel and importlib.util.find_spec(kernel) is None:
        settled["flash_attn"] = "sdpa"
        say(f"{recipe.path}: flash_attn: sdpa; {recipe.flash_attn} needs the package {kernel}, which is not installed")
    if "wandb" in recipe.report_to and wandb_is_disabled():
        settled["report_to"] = [tracker for tracker in recipe.report_to if tracker != "wandb"]
        say(f"{recipe.path}: report_to: wandb is left out, since WANDB_DISABLED is set")
    if recipe.trust_remote_code:
        say(
            f"{recipe.path}: trust_remote_code: the model's own code runs if transformers has none for its architecture"
        )
    if recipe.pure_bf16:
        say(f"{recipe.path}: pure_bf16: bfloat16 keeps 8 bits; at small learning rates most updates round to nothing")
    return recipe.model_copy(update=settled)


def wandb_is_disabled() -> bool:
    """LLaMA-Factory's users set this variable; transformers 5 no longer reads it."""
    return os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")


def conflicts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys that are right alone and wrong together, by the key whose line is named."""
    r = recipe
    full, lora = r.finetuning_type == "full", r.finetuning_type == "lora"
    holds_out = r.val_size > 0
    evaluates = r.do_eval or r.eval_strategy != "no"
    watched = r.load_best_model_at_end or r.trl.get("metric_for_best_model")
    shares = r.interleave_probs
    wrong_share = f"expected one share for each of {len(r.dataset)} datasets, found {len(shares or [])}"
    checks = [
        (not r.do_train and not r.do_eval, "do_train", "nothing to do; set do_train: true"),
        (r.do_train and not r.dataset, "dataset", "do_train needs at least one name of dataset_info.json"),
        (holds_out and not r.dataset, "val_size", "holds out rows of dataset, which names none"),
        (holds_out and r.eval_dataset, "val_size", "eval_dataset is there too; keep one"),
        (r.val_size > 1 and r.val_size % 1, "val_size", f"expected a share or whole rows, found {r.val_size:g}"),
        (
            evaluates and not holds_out and not r.eval_dataset,
            "do_eval" if r.do_eval else "eval_strategy",
            "nothing to evaluate on; set eval_dataset or val_size",
        ),
        (
            r.load_best_model_at_end and r.eval_strategy == "no",
            "load_best_model_at_end",
            "needs eval_strategy: steps or epoch",
        ),
        (
            r.early_stopping_steps and (r.eval_strategy == "no" or not watched),
            "early_stopping_steps",
            "needs eval_strategy, and load_best_model_at_end or metric_for_best_model",
        ),
        (
            shares and r.mix_strategy == "concat",
            "interleave_probs",
            "mix_strategy is concat; write interleave_under or interleave_over",
        ),
        (shares and len(shares) != len(r.dataset), "interleave_probs", wrong_share),
        (r.streaming and r.trl.get("max_steps", -1) <= 0, "streaming", "its length is unknown; set max_steps"),
        (r.streaming and r.max_samples, "max_samples", "does not go with streaming; set max_steps"),
        (r.streaming and 0 < r.val_size < 1, "val_size", "with streaming, expected a whole number of rows"),
        (r.streaming and (r.packing or r.neat_packing), "packing", "does not go with streaming; remove one"),
        (r.mask_history and r.train_on_prompt, "mask_history", "train_on_prompt asks for the opposite; keep one"),
        (r.bf16 and r.fp16, "bf16", "fp16 is on too; keep one"),
        (r.pure_bf16 and r.fp16, "pure_bf16", "fp16 is on too; keep one"),
        (
            r.disable_gradient_checkpointing
            and "gradient_checkpointing" in r.model_fields_set
            and r.gradient_checkpointing,
            "disable_gradient_checkpointing",
            "gradient_checkpointing asks for the opposite; keep one",
        ),
        (
            r.global_batch_size and r.gradient_accumulation_steps != 1,
            "global_batch_size",
            "gradient_accumulation_steps follows from it; remove that line",
        ),
        (r.group_by_length and r.disable_shuffling, "group_by_length", "disable_shuffling is on too; keep one"),
        (
            "train_sampling_strategy" in r.trl and (r.group_by_length or r.disable_shuffling),
            "train_sampling_strategy",
            "group_by_length or disable_shuffling is on too; keep one",
        ),
        (r.create_new_adapter and not r.adapter_name_or_path, "create_new_adapter", "needs adapter_name_or_path"),
        (not lora and r.quantization_bit, "quantization_bit", "a quantized model can't be trained whole; use lora"),
        (r.quantization_bit and r.pissa_init, "pissa_init", "needs a model that is not quantized; remove one"),
        (r.pissa_iter == 0, "pissa_iter", "expected a whole number above 0, or -1 for an exact SVD, found 0"),
        (r.use_galore and r.use_apollo, "use_galore", "use_apollo is on too; keep one"),
        (r.use_dft_loss and "loss_type" in r.trl, "use_dft_loss", "loss_type is there too; keep one"),
    ]
    for key in ("adapter_name_or_path", "loraplus_lr_ratio", "use_rslora", "use_dora", "pissa_init"):
        checks.append((not lora and getattr(r, key), key, "needs finetuning_type: lora"))
    # LLaMA-Factory trains an adapter when the key is omitted; a recipe that counts on that must not train every weight.
    for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target"):
        unsaid = key in r.model_fields_set and "finetuning_type" not in r.model_fields_set
        checks.append((unsaid, key, "needs finetuning_type: lora, which is not the default here"))
    for key in ("use_galore", "use_apollo"):
        checks.append((getattr(r, key) and not full, key, "needs finetuning_type: full"))
        checks.append((getattr(r, key) and r.deepspeed, key, "does not go with deepspeed; remove one"))
        checks.append((getattr(r, key) and "optim" in r.trl, key, "optim is there too; keep one"))
    yield from ((key, why) for wrong, key, why in checks if wrong)
