"""Recipe -> SFTConfig, LoraConfig, BitsAndBytesConfig: the only file that knows both vocabularies."""

from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available
from trl import SFTConfig

from arpo_trl.recipe import Recipe


def to_sft_config(recipe: Recipe) -> SFTConfig:
    """What SFTTrainer is told. Rows arrive cut and encoded, so TRL prepares nothing unless it packs."""
    return SFTConfig(
        output_dir=recipe.output_dir,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=not torch.accelerator.is_available(),
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps or recipe.warmup_ratio,
        bf16=recipe.bf16,
        logging_steps=recipe.logging_steps,
        activation_checkpointing=bool(recipe.gradient_checkpointing),
        gradient_checkpointing=None,  # type: ignore[arg-type]
        report_to=recipe.report_to,
        seed=recipe.seed,
        **recipe.trl,
    )


def to_lora_config(recipe: Recipe, model: PreTrainedModel) -> LoraConfig | None:
    return None


def to_quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    return None


def model_init_kwargs(recipe: Recipe) -> dict[str, Any]:
    return {"dtype": "float32", "revision": recipe.model_revision, "cache_dir": recipe.cache_dir}
