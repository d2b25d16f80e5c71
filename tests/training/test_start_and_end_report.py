"""The start report warns about a missing GPU, and the last lines name the command to resume."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_run
import torch
from transformers import AutoModelForCausalLM, trainer_pt_utils
from trl.trainer.sft_config import SFTConfig

from arpo_trl.errors import RecipeError
from arpo_trl.model.base import compute_dtype
from arpo_trl.model.sft_config import to_sft_config
from arpo_trl.report.manifest import read_manifest
from arpo_trl.run_folder import read_lines
from arpo_trl.training import start_and_end_report
from arpo_trl.training.start_and_end_report import describe_model, missing_gpu, precision, resume_command

pytestmark = small_run.QUIET


@pytest.mark.parametrize(
    ("keys", "use_cpu", "cuda", "reported"),
    [
        ((), None, None, ""),
        ((), "True", None, ""),
        (
            ("bf16=true",),
            None,
            None,
            "although bf16: true expects a GPU: torch .* is a CPU build.*https://pytorch.org",
        ),
        (("fp16=true",), None, "13.0", "although fp16: true expects a GPU: .* does `nvidia-smi`"),
        ((), "False", None, "although the accelerate config expects a GPU"),
    ],
)
def test_a_missing_gpu_is_reported_if_one_is_expected(
    keys: tuple[str, ...],
    use_cpu: str | None,
    cuda: str | None,
    reported: str,
    recipe_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if use_cpu:
        monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    line = "".join(missing_gpu(recipe_of(*keys)))
    assert re.search(reported, line) if reported else line == ""


@pytest.mark.parametrize(
    ("key", "capabilities", "reported"),
    [
        ("bf16", {"avx2": True, "avx512_bf16": False, "amx_bf16": False, "num_sockets": 1}, True),
        ("pure_bf16", {"neon": True, "bf16": False}, True),
        ("bf16", {"avx512_bf16": True, "amx_bf16": False}, False),
        ("bf16", {"neon": True, "bf16": True}, False),
        ("bf16", {}, False),
        ("fp16", {"avx512_bf16": False}, False),
    ],
)
def test_a_cpu_that_is_slower_in_bfloat16_is_reported(
    key: str, capabilities: dict[str, int], reported: bool, recipe_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN held to such a CPU's instructions (ONEDNN_MAX_CPU_ISA): 1.2 times slower under AVX-512, 6 under AVX2."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    recipe = recipe_of(f"{key}=true")
    text = "\n".join(missing_gpu(recipe))
    expected = "force_bf16: true keeps bfloat16" if key == "bf16" else "no bfloat16 instructions; set pure_bf16: false"
    assert (expected in text) is reported
    if key == "fp16":
        assert "fp16: true is computed in float32 on a CPU" in text
        assert (compute_dtype(recipe), to_sft_config(recipe).fp16) == (None, False)
    if key == "bf16":
        assert (compute_dtype(recipe), to_sft_config(recipe).bf16) == (
            (None, False) if reported else (torch.bfloat16, True)
        )
        forced = recipe_of("bf16=true", "force_bf16=true")
        assert (compute_dtype(forced), to_sft_config(forced).bf16) == (torch.bfloat16, True)
        assert ("set force_bf16: false" in "".join(missing_gpu(forced))) is reported


def test_a_run_in_another_precision_is_not_resumed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of a CPU without bfloat16 instructions computes in float32, and stays in it on one that has them."""
    keys = {"bf16": True, "preflight": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    run = small_run.run(tmp_path, tiny_model, **keys)
    manifest = read_manifest(run)
    assert manifest and manifest.computed_in == "float32"
    assert "float32\n" in (run / "training.log").read_text(encoding="utf-8")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    with pytest.raises(RecipeError, match=r"computed in: float32 -> bfloat16 \(set bf16: false\)"):
        small_run.run(tmp_path, tiny_model, **keys, max_steps=6, resume_from_checkpoint=True)


def test_the_resume_command_works_in_every_windows_shell(recipe_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("overwrite_output_dir=true")
    words = [str(recipe.path), "run_name=my run"]
    for platform, quoted, verb in (
        ("linux", "'run_name=my run'", []),
        ("win32", '"run_name=my run"', []),
        ("linux", "'run_name=my run'", ["train"]),
    ):
        argv = ["arpo_trl", *verb, *words]
        monkeypatch.setattr(
            "arpo_trl.training.start_and_end_report.sys", SimpleNamespace(platform=platform, argv=argv)
        )
        monkeypatch.setattr("arpo_trl.shell.sys", SimpleNamespace(platform=platform))
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        command = " ".join(["python -m arpo_trl", *verb])
        expected = f"{command} {recipe.path.as_posix()} {quoted} resume_from_checkpoint=true"
        assert resume_command(recipe) == expected


def test_an_unwritable_plot_does_not_fail_the_run(tiny_model: Path, tmp_path: Path) -> None:
    """And an evaluation before the first step is the log's first line: what the base model could."""
    (tmp_path / "run" / "training_loss.png.tmp").mkdir(parents=True)  # as good as one that a viewer has open
    run = small_run.run(tmp_path, tiny_model, val_size=2, eval_on_start=True)
    manifest = read_manifest(run)
    assert manifest and manifest.status == "finished"
    reported = (run / "training.log").read_text(encoding="utf-8")
    assert "training_loss.png could not be written" in reported and reported.count("\n") > 10
    first = read_lines(run / "trainer_log.jsonl")[0]
    assert first["current_steps"] == 0 and first["eval_loss"] > 0


def test_empty_parameters_of_zero3_are_counted(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed leaves their size in `ds_numel`."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.lm_head.requires_grad_(False)
    whole = describe_model(model)
    for parameter in model.parameters():
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    for module in (start_and_end_report, trainer_pt_utils):
        monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)
    assert describe_model(model) == whole and " trained (" in whole


@pytest.mark.parametrize(
    ("settings", "steps", "line"),
    [
        ({"warmup_steps": 100}, 3, "warmup_steps 100 of 3 steps: the learning rate only reaches 2% of learning_rate"),
        ({"warmup_steps": 2}, 3, None),
        ({"warmup_steps": 0.1}, 100, None),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 5}, 100, None),
        ({"lr_scheduler_type": "constant"}, 100, None),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 100},
                "warmup_steps": 2,
            },
            20,
            "only reaches 50% of learning_rate; fit lr_scheduler_kwargs to the 18 steps",
        ),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 5},
                "warmup_steps": 2,
            },
            20,
            None,
        ),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_reported(
    settings: dict[str, Any], steps: int, line: str | None, tmp_path: Path
) -> None:
    lines = start_and_end_report.warn_of_schedule(
        SFTConfig(str(tmp_path), use_cpu=True, gradient_checkpointing=None, **settings), steps
    )
    assert (line in lines[0]) if line else lines == []


@pytest.mark.parametrize(
    ("frozen", "bf16", "expected"),
    [
        (None, False, "float32"),
        (None, True, "float32, computed in bfloat16"),
        (torch.bfloat16, True, "float32, frozen weights in bfloat16, computed in bfloat16"),
        (torch.float32, False, "float32"),
    ],
)
def test_the_precision_names_the_dtype_of_an_adapters_base(
    frozen: torch.dtype | None, bf16: bool, expected: str
) -> None:
    model: Any = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    if frozen:
        model.append(torch.nn.Linear(2, 2, dtype=frozen).requires_grad_(False))
    args: Any = SimpleNamespace(bf16=bf16, fp16=False)
    assert precision(model, args) == expected
