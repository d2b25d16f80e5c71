"""What a recipe needs and this machine lacks is said before anything is loaded."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from arpo_trl.errors import RecipeError
from arpo_trl.recipe import Recipe
from arpo_trl.recipe.keys import keys
from arpo_trl.run.requirements import check_environment


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that are found; empty unless a test adds some."""
    keys()  # reads transformers' sources, which would not be found either
    found: set[str] = set()

    def find_spec(name: str) -> ModuleSpec | None:
        return ModuleSpec(name, None) if name in found else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return found


def missing(recipe: Recipe) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        check_environment(recipe)
    header, *lines = str(caught.value).split("\n")
    assert header == f"{recipe.path}: {len(lines)} thing{'s' * (len(lines) > 1)} missing on this machine"
    return [line.strip() for line in lines]


def test_all_that_is_missing_is_said_at_once_with_the_way_out(recipe_of: Any, installed: set[str]) -> None:
    recipe = recipe_of("deepspeed=z3.json", "quantization_bit=4", "report_to=wandb", "enable_liger_kernel=true")
    assert missing(recipe) == [
        "deepspeed: not installed; pip install deepspeed, or remove the line and launch with "
        "accelerate_configs/fsdp2.yaml (multi_gpu.yaml where the whole model fits one GPU)",
        "report_to: wandb is not installed; pip install wandb, or write report_to: none",
        "quantization_bit: needs bitsandbytes, which is not installed; pip install bitsandbytes, or remove the line",
        "enable_liger_kernel: needs liger_kernel, which is not installed; pip install liger_kernel, or remove the line",
    ]


def test_a_recipe_that_needs_nothing_more_passes(recipe_of: Any, installed: set[str]) -> None:
    check_environment(recipe_of("bf16=true", "report_to=none"))


def test_a_missing_deepspeed_file_is_named(recipe_of: Any, installed: set[str], tmp_path: Path) -> None:
    installed.add("deepspeed")
    (line,) = missing(recipe_of("deepspeed=z3.json"))
    assert line.startswith(f"deepspeed: there is no file z3.json; paths are relative to {Path.cwd()}")
    (tmp_path / "z3.json").write_text("{}", encoding="utf-8")
    check_environment(recipe_of(f"deepspeed={tmp_path / 'z3.json'}"))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
def test_what_needs_a_gpu_is_refused_without_one(recipe_of: Any) -> None:
    assert missing(recipe_of("activation_offloading=true", "tf32=true", "flash_attn=flex")) == [
        "activation_offloading: needs a GPU; remove the line",
        "tf32: needs a GPU; remove the line",
        "flash_attn: flex attention trains on GPUs only; write sdpa",
    ]


def test_an_unknown_tracker_is_not_to_be_installed(recipe_of: Any) -> None:
    (line,) = missing(recipe_of("report_to=wandbb"))
    assert line.startswith("report_to: expected none, all, or some of azure_ml, ") and line.endswith("found 'wandbb'")


@pytest.mark.parametrize(
    ("line", "package"),
    [
        ("use_galore=true", "galore_torch"),
        ("use_apollo=true", "apollo_torch"),
        ("optim=galore_adamw", "galore_torch"),
        ("optim=paged_adamw_8bit", "bitsandbytes"),
    ],
)
def test_an_optimizers_package_is_asked_for(recipe_of: Any, installed: set[str], line: str, package: str) -> None:
    recipe = recipe_of("finetuning_type=full", line)
    assert f"needs {package}, which is not installed" in missing(recipe)[0]
    installed.add(package)
    check_environment(recipe)


class Wandb:
    def __init__(self, logged_in: bool):
        self.logged_in = logged_in

    def login(self, prompt: bool) -> bool:
        assert prompt is False  # nobody is there to answer
        return self.logged_in


def test_wandb_needs_a_login_unless_it_is_offline(
    recipe_of: Any, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.add("wandb")
    monkeypatch.delitem(os.environ, "WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", Wandb(logged_in=False))
    assert missing(recipe_of("report_to=wandb")) == [
        "report_to: wandb has no login; run `wandb login`, or set WANDB_MODE=offline, or write report_to: none"
    ]
    monkeypatch.setitem(os.environ, "WANDB_MODE", "offline")
    check_environment(recipe_of("report_to=wandb"))
    monkeypatch.delitem(os.environ, "WANDB_MODE")
    monkeypatch.setitem(sys.modules, "wandb", Wandb(logged_in=True))
    check_environment(recipe_of("report_to=wandb"))
