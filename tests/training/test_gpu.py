"""One smoke test for each thing that a GPU does otherwise: python -m pytest -m gpu

Where it can, each runs on the CPU in the slow suite too, so that the tests themselves are tried. No GPU has run them yet.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import architectures
import pytest
import small_run
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, Qwen2Config

from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.tokenizer import load_template
from arpo_trl.errors import RunFailed
from arpo_trl.model.memory import estimate_memory, model_shape
from arpo_trl.model.sft_config import to_sft_config
from arpo_trl.recipe import Recipe
from arpo_trl.run_folder import read_lines
from arpo_trl.training import preflight

pytestmark = small_run.QUIET

THERE = torch.cuda.is_available()
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not THERE, reason="no GPU")])
CPU = pytest.param("cpu", marks=[pytest.mark.slow, pytest.mark.skipif(THERE, reason="a run would use the GPU")])
anywhere = pytest.mark.parametrize("device", [CPU, GPU])
on_gpu = pytest.mark.parametrize("device", [GPU])
WITHIN = {"cpu": 1e-4, "cuda": 2e-3}
"""Nats: sums in another order, and a GPU's float32 kernels."""


@pytest.fixture(autouse=True)
def _free_gpu_memory() -> Iterator[None]:
    yield
    if THERE:
        torch.cuda.empty_cache()


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run / "trainer_log.jsonl") if "loss" in line]


def plain_loss(recipe: Recipe, device: str, rows: int | None = None) -> float:
    """Cross-entropy over the labelled tokens of the first rows, in plain PyTorch, float32, each row alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(recipe.model_name_or_path, dtype=torch.float32).to(device)
    total = torch.zeros(2)
    for row in list(prepare_datasets(recipe, load_template(recipe)).train)[:rows]:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]], device=device)).logits[0, :-1].cpu()
        labels = torch.tensor(row["labels"][1:])
        total += torch.stack([functional.cross_entropy(logits, labels, reduction="sum"), (labels != -100).sum()])
    return float(total[0] / total[1])


@anywhere
def test_the_fused_head_scores_as_plain_pytorch_in_training_and_in_evaluation(
    device: str, tmp_path: Path, tiny_model: Path
) -> None:
    keys = {
        "max_steps": 1,
        "learning_rate": 0.0,
        "disable_shuffling": True,
        "eval_dataset": "counting",
        "do_eval": True,
    }
    run = small_run.run(tmp_path, tiny_model, **keys)
    recipe = small_run.make_recipe(tmp_path, tiny_model, **keys)
    assert losses(run)[0] == pytest.approx(plain_loss(recipe, device, rows=2), abs=WITHIN[device])
    results = json.loads((run / "all_results.json").read_text(encoding="utf-8"))
    assert results["eval_loss"] == pytest.approx(plain_loss(recipe, device), abs=WITHIN[device])


@anywhere
def test_bf16_is_close_to_float32_and_keeps_float32_weights(device: str, tmp_path: Path, tiny_model: Path) -> None:
    full, half = (small_run.run(tmp_path / str(bf16), tiny_model, bf16=bf16) for bf16 in (False, True))
    assert losses(half) == pytest.approx(losses(full), abs=0.05) and losses(half) != losses(full)
    kinds = [{t.dtype for t in load_file(half / name / "model.safetensors").values()} for name in ("checkpoint-4", "")]
    assert kinds == [{torch.float32}, {torch.bfloat16}]


@on_gpu
def test_fp16_skips_overflowing_steps_and_trains(device: str, tmp_path: Path, tiny_model: Path) -> None:
    """Under float16 the scaler meets infinite gradients by design: they end no run."""
    half = losses(small_run.run(tmp_path, tiny_model, fp16=True, max_steps=20))
    assert all(loss == loss for loss in half) and half[-1] < half[0]


@anywhere
def test_generating_replies_does_not_change_the_steps(device: str, tmp_path: Path, tiny_model: Path) -> None:
    keys = {"finetuning_type": "lora", "lora_dropout": 0.3, "full_determinism": device == "cuda", "val_size": 2}
    keys |= {"eval_strategy": "steps", "eval_steps": 2, "max_new_tokens": 8}
    plain = small_run.run(tmp_path / "plain", tiny_model, **keys)
    replied = small_run.run(tmp_path / "replied", tiny_model, predict_during_eval=2, do_predict=True, **keys)
    assert losses(replied) == losses(plain)
    assert (replied / "generated_predictions.jsonl").read_text(encoding="utf-8").count("\n") == 2


@anywhere
@pytest.mark.parametrize("key", ["padding_free", "packing"])
def test_padding_free_rows_have_the_loss_of_padded_rows(
    key: str, device: str, tmp_path: Path, tiny_model: Path
) -> None:
    keys = {"max_steps": 1, "disable_shuffling": True, "cutoff_len": 2048}
    padded = small_run.run(tmp_path / "padded", tiny_model, per_device_train_batch_size=12, **keys)
    size = 1 if key == "packing" else 12
    together = small_run.run(tmp_path / key, tiny_model, per_device_train_batch_size=size, **{key: True}, **keys)
    assert losses(together) == pytest.approx(losses(padded), abs=WITHIN[device])


@on_gpu
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="no flash_attn")
def test_flash_attention_separates_rows(device: str, tmp_path: Path, tiny_model: Path) -> None:
    keys = {"max_steps": 1, "disable_shuffling": True, "bf16": True, "per_device_train_batch_size": 12}
    padded = small_run.run(tmp_path / "padded", tiny_model, **keys)
    flash = small_run.run(tmp_path / "flash", tiny_model, flash_attn="fa2", padding_free=True, **keys)
    assert losses(flash) == pytest.approx(losses(padded), abs=0.05)


@anywhere
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_equals_the_uninterrupted_run(kind: str, device: str, tmp_path: Path, tiny_model: Path) -> None:
    keys = {"finetuning_type": kind, "full_determinism": device == "cuda", "preflight": device == "cuda"}
    whole = small_run.run(tmp_path / "whole", tiny_model, **keys)
    parts = small_run.run(tmp_path / "parts", tiny_model, **keys)
    shutil.rmtree(parts / "checkpoint-4")
    resumed = {"resume_from_checkpoint": str(parts / "checkpoint-2"), "output_dir": str(parts)}
    parts = small_run.run(tmp_path / "parts", tiny_model, **keys, **resumed)
    name = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    left, right = (load_file(run / "checkpoint-4" / name) for run in (whole, parts))
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert losses(parts) == losses(whole)


@anywhere
def test_a_nan_stops_the_run_in_its_step(device: str, tmp_path: Path, tiny_model: Path) -> None:
    broken = tmp_path / "broken"
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(broken)
    for path in tiny_model.iterdir():
        if not (broken / path.name).exists():
            shutil.copy(path, broken)
    with pytest.raises(RunFailed, match=r"loss is nan.*its weight model\.norm\.weight is not finite"):
        small_run.run(tmp_path, broken)


@anywhere
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_trains_a_float32_adapter(bits: int, device: str, tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    keys = {"finetuning_type": "lora", "quantization_bit": bits, "bf16": device == "cuda"}
    if device == "cpu" and bits == 8:
        pytest.skip("tests/model/test_model.py")
    run = small_run.run(tmp_path, tiny_model, **keys)
    assert {t.dtype for t in load_file(run / "checkpoint-4" / "adapter_model.safetensors").values()} == {torch.float32}
    assert losses(run)[-1] < losses(run)[0]


@on_gpu
def test_the_preflight_reserves_optimizer_memory_and_prints_the_peak(
    device: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    held: list[int] = []
    optimizer_memory = preflight._optimizer_memory

    def measured(trainer: Any) -> Any:
        before = torch.cuda.memory_allocated()
        context = optimizer_memory(trainer)
        enter = type(context).__enter__

        class Measured(type(context)):  # type: ignore[misc]
            def __enter__(self) -> None:
                enter(self)
                held.append(torch.cuda.memory_allocated() - before)

        context.__class__ = Measured
        return context

    monkeypatch.setattr(preflight, "_optimizer_memory", measured)
    small_run.run(tmp_path, tiny_model, max_steps=1, gradient_checkpointing="auto")
    weights = sum(t.numel() * 4 for t in load_file(tiny_model / "model.safetensors").values())
    assert held[0] >= 2 * weights
    said = capfd.readouterr().out
    assert " ok, peak " in said and "gradient_checkpointing: auto turns it off" in said


def larger_model(folder: Path) -> Path:
    """A model whose parts matter: 187 MB of float32 weights, in 8 layers of 512 and a vocabulary of 32,000."""
    architectures.make_model("qwen2", folder)
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = Qwen2Config(**shape, num_key_value_heads=2, vocab_size=32000, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@on_gpu
def test_an_out_of_memory_error_names_the_keys_to_change(device: str, tmp_path: Path) -> None:
    """Of 400 MB the weights take half, gradients and moments the rest three times."""
    model = larger_model(tmp_path / "model")
    torch.cuda.set_per_process_memory_fraction(400e6 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(RunFailed, match=r"out of memory on cuda.*Try in this order: lower per_device"):
            small_run.run(tmp_path, model, per_device_train_batch_size=12)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@on_gpu
def test_the_estimate_is_close_to_the_measured_peak(device: str, tmp_path: Path) -> None:
    model = larger_model(tmp_path / "model")
    keys = {"bf16": True, "per_device_train_batch_size": 12, "max_steps": 2, "preflight": False}
    recipe = small_run.make_recipe(tmp_path, model, **keys)
    found = estimate_memory(
        recipe, to_sft_config(recipe), model_shape(recipe), prepare_datasets(recipe, load_template(recipe)).train
    )
    assert found is not None
    torch.cuda.reset_peak_memory_stats()
    small_run.run(tmp_path, model, **keys)
    assert found.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.25)


@on_gpu
@pytest.mark.filterwarnings("default")
def test_a_compiled_model_trains(device: str, tmp_path: Path, tiny_model: Path) -> None:
    assert losses(small_run.run(tmp_path, tiny_model, torch_compile=True, preflight=False))[-1] < 8
