"""Each field of SFTConfig that a recipe may set has, under our trainer, the effect that its help promises."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from safetensors.torch import load_file
from trl.trainer.sft_config import SFTConfig

from arpo_trl.errors import RecipeError
from arpo_trl.recipe import read_recipe
from arpo_trl.recipe.keys import keys
from arpo_trl.recipe.llamafactory import IGNORED, NOT_SUPPORTED, RENAMED
from arpo_trl.run_folder import list_checkpoints, read_lines

ROOT = Path(__file__).parents[2]
pytestmark = [small_run.QUIET, pytest.mark.filterwarnings("default")]

TRAINS_THE_SAME: dict[str, Any] = {
    "torch_empty_cache_steps": 1,
    "logging_first_step": True,
    "log_on_each_node": False,
    "log_level": "error",
    "log_level_replica": "error",
    "disable_tqdm": True,
    "include_num_input_tokens_seen": "non_padding",
    "activation_checkpointing_kwargs": {"use_reentrant": True},
    "gradient_checkpointing": False,
    "eval_on_start": True,
    "eval_delay": 3,
    "save_on_each_node": True,
    "save_total_limit": 1,
    "skip_memory_metrics": False,
    "debug": "underflow_overflow",
    "pad_to_multiple_of": 16,
    "loss_type": "chunked_nll",
    "average_tokens_across_devices": False,
    "dataloader_pin_memory": False,
    "dataloader_in_order": False,
    "accelerator_config": {"non_blocking": True},
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 1,
    "ddp_broadcast_buffers": False,
    "ddp_static_graph": True,
    "ddp_timeout": 60,
    "full_determinism": True,
    "ignore_data_skip": True,
    "eval_packing": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "per_device_eval_batch_size": 1,
    "train_sampling_strategy": "random",
    "data_seed": 42,
    "num_train_epochs": 0.01,
    "fp16": True,
    "dataloader_prefetch_factor": 4,
    "dataloader_persistent_workers": True,
    "dataloader_multiprocessing_context": "spawn",
}
"""Fields of how a run is computed or reported, and a value: the weights are those of a run without it (fp16: on a CPU)."""
TRAINS_OTHERWISE: dict[str, Any] = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.5},
    "warmup_steps": 2,
    "weight_decay": 1.0,
    "adam_beta1": 0.5,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-3,
    "optim": "sgd",
    "optim_args": "momentum=0.5",
    "max_grad_norm": 0.01,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "seed": 7,
    "max_steps": 3,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "bf16": True,
    "dataloader_drop_last": True,
    "packing": True,
}
"""Fields that change what is learned: the weights differ."""
WITH: dict[str, dict[str, Any]] = {
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "optim_args": {"optim": "sgd"},
    "dataloader_drop_last": {"per_device_train_batch_size": 8},
    "packing": {"cutoff_len": 128},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
}
"""Other keys that the value requires, in both runs."""
ALSO = {"bf16": {"force_bf16": True}}  # only in the run with the value
FAST = ("debug", "eval_packing", "full_determinism", "neftune_noise_alpha")

HARMLESS = {
    "output_dir": "a folder",
    "run_name": "a name in trackers",
    "project": "a name in trackers",
    "report_to": "trackers; tests/report/test_trackers.py",
    "trackio_space_id": "passed to Trackio",
    "trackio_bucket_id": "passed to Trackio",
    "trackio_static_space_id": "passed to Trackio",
    "use_cpu": "set where torch finds no device",
    "trust_remote_code": "ours; tests/faults/test_untrusted.py",
    "do_train": "ours; tests/training/test_evaluate.py",
    "do_eval": "ours; tests/training/test_evaluate.py",
    "do_predict": "ours; tests/generate/test_predict.py",
    "eval_strategy": "tests/training/test_evaluate.py",
    "eval_steps": "tests/training/test_evaluate.py",
    "save_strategy": "tests/training/test_check.py",
    "save_steps": "tests/faults/test_resumed_runs.py",
    "save_only_model": "tests/faults/test_incomplete_checkpoints.py",
    "logging_steps": "tests/faults/test_exact_resume.py",
    "logging_strategy": "tests/faults/test_resumed_runs.py",
    "load_best_model_at_end": "tests/faults/test_resumed_runs.py",
    "metric_for_best_model": "tests/faults/test_resumed_runs.py",
    "greater_is_better": "tests/model/test_sft_config.py",
    "resume_from_checkpoint": "tests/faults/test_resumed_runs.py",
    "padding_free": "tests/training/test_padding_free.py",
    "truncation_mode": "ours; tests/data/test_labels.py",
    "dataloader_num_workers": "tests/faults/test_exact_resume.py",
    "deepspeed": "tests/training/test_engines.py",
    "fsdp": "tests/model/test_sft_config.py",
    "fsdp_config": "tests/model/test_sft_config.py",
    "ddp_backend": "passed to torch.distributed",
    "push_to_hub": "requires the hub; tests/report/test_model_card.py",
    "hub_model_id": "a name on the hub",
    "hub_private_repo": "passed to the hub",
    "hub_strategy": "tests/report/test_model_card.py",
    "hub_always_push": "passed to the hub",
    "hub_revision": "passed to the hub",
    "optim_target_modules": "of GaLore and APOLLO; tests/model/test_sft_config.py",
    "torch_compile": "tests/training/test_gpu.py",
    "torch_compile_backend": "passed to torch.compile",
    "torch_compile_mode": "passed to torch.compile",
    "tf32": "requires a GPU; tests/training/test_requirements.py",
    "activation_offloading": "requires a GPU; tests/training/test_requirements.py",
    "liger_kernel_config": "requires Triton",
}
"""Fields that another test has, or that this machine can't try, with the reason."""


def test_each_field_is_tried_rejected_or_listed() -> None:
    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    elsewhere = NOT_SUPPORTED.keys() | IGNORED.keys() | RENAMED.keys()
    tried = TRAINS_THE_SAME.keys() | TRAINS_OTHERWISE.keys()
    assert fields - elsewhere - tried - HARMLESS.keys() == set()
    assert (tried | HARMLESS.keys()) - fields - {"gradient_checkpointing"} == set()
    assert tried & HARMLESS.keys() == (tried | HARMLESS.keys()) & elsewhere == set()
    named = [
        (key, text) for key, reason in HARMLESS.items() for text in reason.split("; ") if text.startswith("tests/")
    ]
    unnamed = [name for name in named if not re.search(rf"\b{name[0]}\b", (ROOT / name[1]).read_text("utf-8"))]
    assert unnamed == []


@pytest.fixture(scope="module")
def weights_of(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Any]:
    """Return a function that trains with these keys, once, and returns its folder and weights at the last step."""
    made: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}

    def train(**keys: Any) -> tuple[Path, dict[str, torch.Tensor]]:
        name = repr(sorted(keys.items()))
        if name not in made:
            folder = tmp_path_factory.mktemp("fields")
            values = {
                "val_size": 3,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "do_eval": True,
                "tokenized_path": None,
            }
            out = small_run.run(folder, tiny_model, **values | {"save_total_limit": None} | keys)
            made[name] = out, load_file(list_checkpoints(out)[-1] / "model.safetensors")
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield train


def _cases(values: dict[str, Any]) -> list[Any]:
    return [pytest.param(k, v, id=k, marks=[] if k in FAST else pytest.mark.slow) for k, v in values.items()]


@pytest.mark.parametrize(("key", "value"), _cases(TRAINS_THE_SAME))
def test_a_field_of_how_a_run_is_computed_changes_no_weight(key: str, value: Any, weights_of: Any) -> None:
    """Nor the evaluation; half precision rounds it."""
    base, expected = weights_of(**WITH.get(key, {}))
    out, weights = weights_of(**WITH.get(key, {}) | {key: value})
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight) or key in ("pad_to_multiple_of", "gradient_checkpointing"), name
        torch.testing.assert_close(weights[name], weight)
    final = [read_lines(folder / "trainer_log.jsonl")[-1] for folder in (base, out)]
    assert final[0]["eval_loss"] == pytest.approx(final[1]["eval_loss"], abs=2e-2 if "full_eval" in key else 1e-5)


@pytest.mark.parametrize(("key", "value"), _cases(TRAINS_OTHERWISE))
def test_a_field_of_what_is_learned_changes_the_weights(key: str, value: Any, weights_of: Any) -> None:
    _, before = weights_of(**WITH.get(key, {}))
    _, weights = weights_of(**WITH.get(key, {}) | ALSO.get(key, {}) | {key: value})
    assert any(not torch.equal(weights[name], weight) for name, weight in before.items())


def rejected() -> list[str]:
    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    return sorted(name for name in NOT_SUPPORTED if name in fields)


@pytest.mark.parametrize("key", rejected())
def test_a_field_that_is_not_supported_is_rejected_with_a_reason(key: str, tmp_path: Path, tiny_model: Path) -> None:
    path = small_run.write_recipe(tmp_path, tiny_model, dataset="a", **{key: "true"})
    with pytest.raises(RecipeError, match=f"{key}: not supported; {NOT_SUPPORTED[key][:20]}"):
        read_recipe(path)
    assert key not in keys()
