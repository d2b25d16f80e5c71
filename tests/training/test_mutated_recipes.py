"""`--check` of a recipe with an extreme value ends in 0 or 2, never in a traceback, and 2 names the key.

Each recipe passes the type check: it is read without problems, and fails later if at all. All run in this process.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import small_run

from arpo_trl.__main__ import main
from arpo_trl.errors import RecipeError
from arpo_trl.recipe import read_recipe
from arpo_trl.recipe.keys import keys

FAST = 20
# Values that a type allows and a run may not: bounds, zero, null, empty, very large and very small.
NUMBERS = ("0", "1", "-1", "1000000", "1e-12", "0.999", "1e9")
TEXTS = ('""', "null", "no such thing", "[]", "{}")
# Keys that depend on each other, and pairs of their values.
PAIRS = (
    "lr_scheduler_type=polynomial learning_rate=1e-9",
    "lr_scheduler_type=cosine_with_min_lr",
    "lr_scheduler_type=warmup_stable_decay warmup_steps=3",
    "lr_scheduler_type=reduce_lr_on_plateau",
    "lr_scheduler_type=inverse_sqrt lr_scheduler_kwargs={timescale: 0}",
    "warmup_steps=1000 max_steps=2",
    "warmup_ratio=0.5 warmup_steps=2",
    "val_size=0.5 eval_strategy=steps eval_steps=0.3 load_best_model_at_end=true save_steps=0.7",
    "val_size=11 eval_strategy=epoch metric_for_best_model=mean_token_accuracy greater_is_better=false",
    "val_size=2 eval_strategy=steps eval_steps=3 load_best_model_at_end=true save_steps=2",
    "packing=true cutoff_len=8",
    "packing=true neat_packing=true padding_free=true",
    "padding_free=true per_device_train_batch_size=1",
    "cutoff_len=1",
    "cutoff_len=2 truncation_mode=llamafactory",
    "streaming=true max_steps=3",
    "streaming=true max_steps=3 group_by_length=true",
    "group_by_length=true dataloader_drop_last=true",
    "dataloader_num_workers=2 dataloader_prefetch_factor=0",
    "accelerator_config={split_batches: true}",
    "accelerator_config={dispatch_batches: true}",
    "accelerator_config={even_batches: false}",
    "accelerator_config={no_such_key: 1}",
    "finetuning_type=lora lora_rank=100000",
    "finetuning_type=lora lora_target=no_such_module",
    "finetuning_type=lora lora_target=embed_tokens,lm_head",
    "finetuning_type=lora lora_alpha=0 lora_dropout=1",
    "finetuning_type=lora use_dora=true use_rslora=true",
    "finetuning_type=lora additional_target=lm_head",
    "finetuning_type=freeze freeze_trainable_layers=99",
    "finetuning_type=freeze freeze_trainable_layers=-99",
    "bf16=true pure_bf16=true",
    "optim=no_such_optimizer",
    "optim=adamw_torch_fused weight_decay=1e9 adam_beta1=0",
    "optim=sgd max_grad_norm=0",
    "save_strategy=best",
    "save_total_limit=0",
    "save_strategy=no load_best_model_at_end=true",
    "early_stopping_steps=1",
    "predict_during_eval=4 val_size=2 eval_strategy=steps",
    "auto_find_batch_size=true",
    "neftune_noise_alpha=0",
    "label_smoothing_factor=1",
    "torch_compile=true",
    "gradient_checkpointing=true use_reentrant_gc=true",
    "disable_gradient_checkpointing=true",
    "rope_scaling=linear cutoff_len=100000",
    "flash_attn=flex",
    "num_train_epochs=0 max_steps=-1",
    "num_train_epochs=0.001",
    "logging_steps=0.001",
    "save_steps=1e9",
    "mix_strategy=interleave_under interleave_probs=1.0,0.0 dataset=counting,greetings",
    "mask_history=true train_on_prompt=true",
    "enable_thinking=false template=qwen3",
    "seed=-1",
    "data_seed=-5",
    "max_samples=1 val_size=1",
    "global_batch_size=7",
    "report_to=no_such_tracker",
    "run_name=a/b:c*?",
    "default_system=",
    "push_to_hub=true",
    "resume_from_checkpoint=true",
    "overwrite_output_dir=true resume_from_checkpoint=true",
)
SKIPPED = {
    *("output_dir", "model_name_or_path", "cache_dir", "deepspeed", "fsdp", "debug", "use_cpu", "tokenized_path"),
    *("ddp_backend", "local_rank", "trust_remote_code", "logging_dir"),
}
"""Keys of other machines and processes, or whose value is a place to write to."""


def mutations(count: int) -> list[tuple[str, ...]]:
    """Return the pairs, then keys with one extreme value each, drawn with a fixed seed."""
    draw = random.Random(0)
    known = [key for key in sorted(keys()) if key not in SKIPPED]
    found = [tuple(_split(pair)) for pair in PAIRS]
    while len(found) < count:
        key = draw.choice(known)
        is_number = any(kind in str(keys()[key].schema) for kind in ("integer", "number"))
        found.append((f"{key}={draw.choice(NUMBERS if is_number else TEXTS)}",))
    return found


def _split(pair: str) -> list[str]:
    """Split at the spaces that a key follows: a mapping contains spaces, too."""
    parts: list[str] = []
    for word in pair.split(" "):
        if "=" in word:
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    return parts


ALL = mutations(400)


def _passes_types(recipe: Path, overrides: tuple[str, ...]) -> bool:
    try:
        read_recipe(recipe, list(overrides))
    except RecipeError:
        return False
    return True


def check_all(cases: list[tuple[str, ...]], folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Check each case that passes the type check, and return their number."""
    data = small_run.write_data(folder / "data")
    recipe = small_run.write_recipe(folder, model, dataset="counting", dataset_dir=str(data))
    wrong, checked = [], 0
    for overrides in cases:
        if not _passes_types(recipe, overrides):
            continue
        checked += 1
        try:
            code = main(["--check", str(recipe), *overrides])
        except BaseException as error:  # a traceback, whatever its type
            wrong.append((overrides, repr(error)[:300]))
            continue
        message = capsys.readouterr().err
        if code not in (0, 2):
            wrong.append((overrides, f"exit {code}: {message[-300:]}"))
        elif code == 2 and not any(override.partition("=")[0] in message for override in overrides):
            wrong.append((overrides, f"names no key: {message[-300:]}"))
    assert not wrong, "\n".join(f"{' '.join(case)}\n    {problem}" for case, problem in wrong)
    return checked


@pytest.mark.filterwarnings("ignore")
def test_some_mutated_recipes_end_in_0_or_2_and_name_the_key(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert check_all(ALL[: FAST + 4], tmp_path, tiny_model, capsys) >= FAST


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_150_mutated_recipes_end_in_0_or_2_and_name_the_key(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_all(ALL, tmp_path, tiny_model, capsys) >= 150
