"""The parts of a step's memory are what the model, its optimizer and autograd really hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from arpo_trl.recipe import read_recipe
from arpo_trl.recipe.keys import Recipe
from arpo_trl.run import memory
from arpo_trl.run.memory import Memory, describe_memory, estimate_memory
from arpo_trl.run.model import load_model
from arpo_trl.run.sft_config import to_sft_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ROWS = Dataset.from_list([{"input_ids": [5] * n, "labels": [-100] * 10 + [5] * (n - 10)} for n in (20, 80, 60, 30)])


def recipe(folder: Path, model: Path, *lines: str) -> Recipe:
    path = folder / "r.yaml"
    keys = f"model_name_or_path: {model}\noutput_dir: {folder}/out\ndo_train: true\ndataset: a\n"
    path.write_text(f"{keys}per_device_train_batch_size: 2\n", encoding="utf-8")
    return read_recipe(path, ["finetuning_type=full", *lines] if "finetuning_type=lora" not in lines else lines)


@pytest.mark.parametrize(
    "lines",
    [[], ["finetuning_type=lora"], ["finetuning_type=freeze"], ["bf16=true"], ["bf16=true", "finetuning_type=lora"]],
    ids=" ".join,
)
def test_the_parts_are_those_of_the_loaded_model(lines: list[str], tmp_path: Path, tiny_model: Path) -> None:
    given = recipe(tmp_path, tiny_model, "gradient_checkpointing=false", *lines)
    args = to_sft_config(given)
    found = estimate_memory(given, args, ROWS)
    assert found is not None
    model: Any = load_model(given)[0]
    parameters = list(model.parameters())
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    assert found.weights == sum(p.nbytes for p in parameters)
    head = 0 if lines and "finetuning" in lines[-1] else 1088 * 64 * 4  # its gradient; it is the embedding too
    assert (found.gradients, found.optimizer) == (trained + head, 2 * trained)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        saved, _ = memory._saved_by_autograd(model, 2, 80)
    assert found.activations == pytest.approx(saved, rel=0.02)  # fake tensors have no hidden padding
    half = args.bf16
    assert found.logits == 120 * 1088 * (14 if half else 12) + (2 * 1088 * 64 if half else 0) + head


@pytest.mark.parametrize(
    ("lines", "shape"),
    [
        ([], (2, 80, 120)),
        (["padding_free=true"], (1, 140, 120)),
        (["packing=true", "cutoff_len=100"], (1, 200, 120)),
        (["per_device_train_batch_size=8"], (4, 80, 150)),
    ],
)
def test_the_batch_is_the_largest_that_the_sampler_can_draw(
    lines: list[str], shape: tuple[int, int, int], tmp_path: Path, tiny_model: Path
) -> None:
    given = recipe(tmp_path, tiny_model, *lines)
    assert memory._largest_batch(given, to_sft_config(given), ROWS) == shape


def test_checkpointing_keeps_one_block_and_a_stream_a_block(tmp_path: Path, tiny_model: Path) -> None:
    kept, recomputed = (
        estimate_memory(given, to_sft_config(given), ROWS)
        for given in (recipe(tmp_path, tiny_model, f"gradient_checkpointing={on}") for on in ("false", "true"))
    )
    assert kept and recomputed
    assert recomputed.activations == 2 * (2 * 80 * 64 * 4) + kept.activations // 2


def test_it_is_said_where_it_fits() -> None:
    memory = Memory(2_000_000_000, 2_000_000_000, 4_000_000_000, 3_000_000_000, 1_000_000_000)
    assert memory.peak == 10_000_000_000
    parts = "about 10.0 GB at its peak (weights 2.0, gradients 2.0, optimizer 4.0, activations 3.0, logits 1.0); "
    assert describe_memory(memory, None) == f"{parts}fits a GPU of 16 GB"
    assert describe_memory(memory, 10_500_000_000) == f"{parts}does not fit this GPU of 10 GB"
    assert describe_memory(memory._replace(optimizer=90_000_000_000), None).endswith("does not fit a GPU of 80 GB")
