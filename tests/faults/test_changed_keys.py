"""A key that a resumed run reports as changed is changed at once, and exactly; the others are rejected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from small_pairs import write_pairs
from small_run import make_recipe
from torch.nn import Dropout
from torch.optim.lr_scheduler import LambdaLR

from arpo_trl.errors import RecipeError
from arpo_trl.model.methods import chosen
from arpo_trl.model.model import load_model
from arpo_trl.recipe.keys import keys
from arpo_trl.report.manifest import CANNOT_CHANGE, MAY_CHANGE, METRIC_KEYS, Manifest, require_same_run
from arpo_trl.training import train as train_module
from arpo_trl.training.train import train
from arpo_trl.training.trainer import ArpoTrainer

pytestmark = pytest.mark.filterwarnings("default")
STEP = 2  # of the checkpoint

SFT: dict[str, Any] = {
    "learning_rate": 1e-4,
    "weight_decay": 5.0,
    "adam_beta1": 0.1,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-3,
    "max_steps": 20,
    "num_train_epochs": 5,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_decay_steps": 7},
    "warmup_ratio": 0.5,
    "warmup_steps": 3,
    "max_grad_norm": 0.5,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "global_batch_size": 4,
    "dataset": "greetings",
    "template": "alpaca",
    "default_system": "Be short.",
    "cutoff_len": 80,
    "truncation_mode": "llamafactory",
    "max_samples": 6,
    "mix_strategy": "interleave_under",
    "interleave_probs": [0.5, 0.5],
    "streaming": True,
    "buffer_size": 3,
    "train_on_prompt": True,
    "mask_spans": ["[0-3] "],
    "packing": True,
    "neat_packing": True,
    "padding_free": True,
    "disable_shuffling": True,
    "group_by_length": True,
    "train_sampling_strategy": "sequential",
    "dataloader_drop_last": True,
    "data_seed": 7,
    "val_size": 2,
    "use_dft_loss": True,
    "loss_type": "dft",
    "use_eaft_loss": True,
    "eaft_alpha": 0.5,
    "use_asft_loss": True,
    "asft_alpha": 0.5,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "flash_attn": "disabled",
    "rope_scaling": "linear",
    "pure_bf16": True,
    "bf16": True,
    "pad_to_multiple_of": 16,
    "average_tokens_across_devices": False,
    "full_determinism": True,
    "disable_gradient_checkpointing": True,
    "activation_checkpointing_kwargs": {"preserve_rng_state": False},
    "ignore_data_skip": True,
    "enable_thinking": False,
    "accelerator_config": {"use_seedable_sampler": False},
    "torch_empty_cache_steps": 2,
    "eval_dataset": "greetings",
    "model_name_or_path": "another",
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "debug": "underflow_overflow",
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 5,
    "ddp_broadcast_buffers": False,
    "ddp_static_graph": True,
}
LORA: dict[str, Any] = {"lora_alpha": 64, "lora_dropout": 0.3, "use_rslora": True}
DPO: dict[str, Any] = {
    "pref_beta": 0.3,
    "pref_loss": "hinge",
    "simpo_gamma": 1.0,
    "pref_ftx": 0.5,
    "dpo_label_smoothing": 0.1,
    "ld_alpha": 0.5,
    "ref_model": "another",
    "precompute_ref_log_probs": True,
}
BASES: dict[str, dict[str, Any]] = {
    "mix_strategy": {"dataset": "counting,greetings"},
    "interleave_probs": {"dataset": "counting,greetings", "mix_strategy": "interleave_under"},
    "buffer_size": {"streaming": True},
    "streaming": {"buffer_size": 3},
    "truncation_mode": {"cutoff_len": 80},
    "num_train_epochs": {"max_steps": -1},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
    "eaft_alpha": {"use_eaft_loss": True},
    "asft_alpha": {"use_asft_loss": True},
    "rope_scaling": {"cutoff_len": 100_000},
    "enable_thinking": {"template": "qwen3"},
    "simpo_gamma": {"pref_loss": "simpo"},
    "dpo_label_smoothing": {"pref_loss": "sigmoid"},
    "train_sampling_strategy": {"train_sampling_strategy": "group_by_length"},
}
FAST = ("learning_rate", "weight_decay", "lr_scheduler_type", "max_steps", "lora_alpha", "pref_beta")

NOT_HERE: dict[str, str] = {
    "model_revision": "of a model on the hub",
    "use_fast_tokenizer": "the tokenizer's implementation; rows are compared by template_hash and data",
    "enable_liger_kernel": "requires Triton",
    "liger_kernel_config": "requires Triton",
    "do_train": "a resumed run trains",
    "preserve_thinking": "of rows with reasoning; with mask_history, whose rows are encoded again",
    "ref_model_adapters": "as ref_model",
    "mask_history": "of rows with several turns, which are encoded again",
    "pair_all_answers": "of rows with several answers, which are encoded again",
    "force_bf16": "of a CPU without bfloat16 instructions; run.json compares computed_in",
    "deepspeed": "how the model is split; test_distributed.py",
    "fsdp": "how the model is split; test_distributed.py",
    "fsdp_config": "how the model is split; test_distributed.py",
    "module_dropout": "OFT's; read as lora_dropout is",
    "moe_aux_loss_coef": "of a mixture of experts; read from the recipe at each step",
    "tf32": "requires a GPU",
    "torch_compile": "compiles for a minute; read when the model is prepared",
    "torch_compile_backend": "as torch_compile",
    "torch_compile_mode": "as torch_compile",
    "dataloader_multiprocessing_context": "of workers, which do not change the batches",
    "ddp_backend": "of a launch",
    "dataloader_in_order": "of workers, which do not change the batches",
}


def compared_keys() -> set[str]:
    return keys().keys() - MAY_CHANGE - CANNOT_CHANGE


def test_each_compared_key_is_tried_or_listed_with_a_reason() -> None:
    tried = {*SFT, *LORA, *DPO}
    assert compared_keys() - tried - NOT_HERE.keys() == set()
    assert (tried - {"train_sampling_strategy"}) - compared_keys() == set()
    assert tried & NOT_HERE.keys() == set()


class Captured(Exception):
    pass


def capture(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> dict[str, Any]:
    """Return all that decides the next step of a run, when it is about to take its first one of the session."""
    captured: dict[str, Any] = {}

    def before_first_step(recipe: Any, trainer: ArpoTrainer, data: Any) -> None:
        captured.update(describe(trainer))
        raise Captured

    def trainer_kwargs(*args: Any) -> dict[str, Any]:
        given = chosen.trainer_kwargs(*args)
        captured["objective"] = str(getattr(given.get("objective"), "keywords", None))
        return given

    with monkeypatch.context() as patch, pytest.raises(Captured):
        patch.setattr(train_module, "before_first_step", before_first_step)
        patch.setattr(train_module, "trainer_kwargs", trainer_kwargs)
        train(recipe_of(folder, model, **keys))
    return captured


def describe(trainer: ArpoTrainer) -> dict[str, Any]:
    args, model, schedule, rows = trainer.args, trainer.model, trainer.lr_scheduler, trainer.train_dataset
    assert trainer.optimizer is not None and isinstance(schedule, LambdaLR)
    rates = [base * factor(STEP) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
    groups = trainer.optimizer.param_groups
    if trainer.state.global_step:
        assert trainer.state.global_step == schedule.last_epoch == STEP
        assert [group["lr"] for group in groups] == rates  # at once
    config = model.peft_config["default"].to_dict() if isinstance(model, PeftModel) else {}
    preference = trainer.preference
    return {
        "rates": rates,
        "groups": [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups],
        "steps": trainer.state.max_steps,
        "args": {k: str(v) for k, v in args.to_dict().items() if k not in ("output_dir", "run_name")},
        "rows": list(rows.select_columns(["input_ids", "labels"])) if isinstance(rows, Dataset) else _first(rows),
        "eval_rows": str(trainer.eval_dataset),
        "attention": model.config._attn_implementation,
        "model": {k: str(v) for k, v in (model.config.to_dict() | config).items()},
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        "scalings": [m.scaling for m in model.modules() if hasattr(m, "scaling")],
        "dropouts": [m.p for m in model.modules() if isinstance(m, Dropout)],
        "batches": [trainer._train_batch_size, trainer.get_train_dataloader().batch_size],
        "preference": preference and preference.recipe.model_dump(include={*DPO}),
        "reference": preference and str(type(preference.reference)),
    }


def _first(rows: Any) -> dict[str, Any]:
    row = next(iter(rows))
    return {name: [int(token) for token in row[name]] for name in ("input_ids", "labels")}


def recipe_of(folder: Path, model: Path, **keys: Any) -> Any:
    """Return a recipe whose `another` model is a copy of the same."""
    another = model.parent / "another"  # one path, for all runs
    for key in ("model_name_or_path", "ref_model"):
        if keys.get(key) == "another":
            shutil.copytree(model, another, dirs_exist_ok=True)
            keys[key] = str(another)
    if keys.get("stage") == "dpo":
        keys |= {"dataset": "pairs", "dataset_dir": str(write_pairs(folder / "pairs", 12))}
    return make_recipe(folder, model, **{"tokenized_path": None, "plot_loss": False} | keys)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Any]:
    """Return a function that returns the folder of a run that was killed after step 2, by the run's keys."""
    made: dict[str, Path] = {}

    def fail(*args: object) -> None:
        raise Captured

    def make(base: dict[str, Any]) -> Path:
        name = json.dumps(base, sort_keys=True)
        if name not in made:
            made[name] = tmp_path_factory.mktemp("stopped")
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Captured):
                patch.setattr(ArpoTrainer, "save_final_model", fail)
                train(recipe_of(made[name], tiny_model, **base))
            for checkpoint in (made[name] / "run").glob("checkpoint-*"):
                if checkpoint.name != f"checkpoint-{STEP}":
                    shutil.rmtree(checkpoint)
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield make


@pytest.fixture(scope="module")
def unchanged() -> dict[str, Any]:
    """What `capture` returns of a new run, by its keys."""
    return {}


CASES: list[tuple[str, Any, dict[str, Any]]] = [(key, value, {}) for key, value in SFT.items()]
CASES += [(key, value, {"finetuning_type": "lora", "lora_dropout": 0.1}) for key, value in LORA.items()]
CASES += [(key, value, {"stage": "dpo"}) for key, value in DPO.items()]


@pytest.mark.parametrize(
    ("key", "value", "base"),
    [pytest.param(*case, id=case[0], marks=[] if case[0] in FAST else pytest.mark.slow) for case in CASES],
)
def test_a_changed_key_has_the_effect_that_it_has_in_a_new_run(
    key: str,
    value: Any,
    base: dict[str, Any],
    stopped: Any,
    unchanged: Any,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: Any,
) -> None:
    """Rates, groups, rows, model and loss are those of a run that starts with the changed key, and not those without."""
    base = base | BASES.get(key, {})
    shutil.copytree(stopped(base) / "run", tmp_path / "resumed" / "run")
    changed = base | {key: value, "allow_changed_recipe": True}
    resumed = capture(tmp_path / "resumed", tiny_model, monkeypatch, **changed)
    new = capture(tmp_path / "new", tiny_model, monkeypatch, **changed)
    assert [name for name in new if resumed[name] != new[name]] == []
    if json.dumps(base, sort_keys=True) not in unchanged:
        unchanged[json.dumps(base, sort_keys=True)] = capture(tmp_path / "unchanged", tiny_model, monkeypatch, **base)
    assert new != unchanged[json.dumps(base, sort_keys=True)] or key in ("model_name_or_path", "ref_model")


@pytest.mark.parametrize("key", sorted(CANNOT_CHANGE))
def test_a_key_of_what_a_checkpoint_contains_is_rejected(key: str) -> None:
    """Also if allow_changed_recipe is set."""
    default, other = keys()[key].default, "another"
    with pytest.raises(RecipeError, match=rf"\n  {key}: .* -> 'another'\n  {key}: a checkpoint contains this"):
        require_same_run(manifest(**{key: default}), manifest(**{key: other}), allow_changed_recipe=True)


@pytest.mark.parametrize("key", ["learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", *METRIC_KEYS])
def test_a_schedule_that_follows_a_metric_keeps_its_keys(key: str) -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau"}
    before, now = manifest(**plateau), manifest(**plateau | {key: "another"})
    with pytest.raises(RecipeError, match=f"\n  {key}: a checkpoint contains this"):
        require_same_run(before, now, allow_changed_recipe=True)


def manifest(**keys: Any) -> Manifest:
    values = {"recipe": keys, "data": {}, "day": "2026-11-29", "versions": {}}
    return Manifest.model_validate_json(json.dumps(values))


def test_changed_settings_train_as_a_hand_written_step(stopped: Any, tmp_path: Path, tiny_model: Path) -> None:
    """AdamW from the checkpoint's moments: the first step after the resume has the new rate, decay, betas and epsilon."""
    keys = {"learning_rate": 3e-4, "weight_decay": 2.0, "adam_beta1": 0.5, "adam_epsilon": 1e-6, "max_steps": 3}
    folder = tmp_path / "resumed"
    shutil.copytree(stopped({}) / "run", folder / "run")
    before = load_file(folder / "run" / f"checkpoint-{STEP}" / "model.safetensors")
    moments = torch.load(folder / "run" / f"checkpoint-{STEP}" / "optimizer.pt", weights_only=True)["state"]
    seen: dict[str, Any] = {}
    step = AcceleratedOptimizer.step

    def record(self: Any, closure: Any = None) -> None:
        names = {id(p): name for name, p in seen["model"].named_parameters()}
        seen["parts"] = [
            [(names[id(p)], p.grad.clone(), group["weight_decay"]) for p in group["params"]]
            for group in self.param_groups
        ]
        step(self, closure)
        seen["weights"] = {name: p.detach().clone() for name, p in seen["model"].named_parameters()}

    def keep_model(*args: Any, **kwargs: Any) -> Any:
        loaded = load_model(*args, **kwargs)
        seen["model"] = loaded[0]
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratedOptimizer, "step", record)
        patch.setattr(train_module, "load_model", keep_model)
        train(recipe_of(folder, tiny_model, allow_changed_recipe=True, save_strategy="no", **keys))
    rate, number = 3e-4 * (1 - STEP / 3), STEP + 1  # the linear schedule's third step of three
    for index, (name, grad, decay) in enumerate(part for group in seen["parts"] for part in group):
        mean = 0.5 * moments[index]["exp_avg"] + 0.5 * grad
        square = 0.999 * moments[index]["exp_avg_sq"] + 0.001 * grad**2
        step_size = mean / (1 - 0.5**number) / ((square / (1 - 0.999**number)).sqrt() + 1e-6)
        expected = before[name] * (1 - rate * decay) - rate * step_size
        torch.testing.assert_close(seen["weights"][name], expected, atol=1e-6, rtol=1e-5)
    assert {decay for group in seen["parts"] for _, _, decay in group} == {2.0, 0.0}
