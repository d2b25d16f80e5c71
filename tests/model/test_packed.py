"""Training on a base quantized with GPTQ, AWQ or AQLM. Skipped without gptqmodel and optimum, or aqlm."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from launches import launch, write_recipe
from packed_model import pack
from safetensors.torch import load_file
from small_run import make_recipe
from test_model import INPUT_IDS, OFT, ROWS, assert_a_resume_is_exact, recipe, run
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from arpo_trl.errors import RecipeError
from arpo_trl.model import memory
from arpo_trl.model.memory import estimate_memory, model_shape
from arpo_trl.model.merge import merge
from arpo_trl.model.model import load_model
from arpo_trl.model.sft_config import to_sft_config
from arpo_trl.training.setup import check_after_torch
from arpo_trl.training.train import train

KINDS = {"gptq": "GPTQLoraLinear", "awq": "AwqLoraLinear", "aqlm": "AqlmLoraLinear"}
METHODS = pytest.mark.parametrize("method", KINDS)
SHAPE = (4, 12)  # of ROWS' batches
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # the packages' own warnings


@pytest.fixture
def base(method: str, tiny_model: Path, tmp_path: Path) -> Path:
    for package in {"aqlm": ["aqlm"]}.get(method, ["gptqmodel", "optimum"]):
        pytest.importorskip(package)
    return pack(tiny_model, tmp_path / method, method)


def logits(model: Any, bf16: bool = False) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found: torch.Tensor = model.eval()(input_ids=INPUT_IDS).logits.float()
    return found


@METHODS
@pytest.mark.parametrize("kind", ["lora", "oft"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_base_predicts_as_its_dequantized_weights_and_the_adapter_learns(
    method: str, kind: str, bf16: bool, base: Path, tmp_path: Path
) -> None:
    """It predicts as the same weights dequantized; the saved adapter, loaded again, predicts what was trained."""
    keys = {"max_steps": 20, "bf16": bf16, "logging_steps": 1, "learning_rate": 1e-2, **(OFT if kind == "oft" else {})}
    given = recipe(tmp_path / "out", base, **keys)
    model = load_model(given)[0]
    plain = AutoModelForCausalLM.from_pretrained(f"{base}_plain", dtype=torch.float32)
    expected = logits(plain)
    assert (logits(model) - expected).abs().max() < 0.02 * expected.abs().max()
    if kind == "lora":
        assert sum(type(module).__name__ == KINDS[method] for module in model.modules()) == 14  # 7 in each of 2 blocks

    trainer = run(given)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.2
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    again = load_model(recipe(tmp_path / "again", base, adapter_name_or_path=str(tmp_path / "out"), **keys))[0]
    assert torch.equal(logits(again, bf16), logits(trainer.model, bf16))


@METHODS
@pytest.mark.parametrize("keys", [{"bf16": True}, OFT], ids=str)
def test_a_resumed_run_equals_the_uninterrupted_one(
    method: str, keys: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    assert_a_resume_is_exact(tmp_path, base, "adapter_model.safetensors", **keys, lora_dropout=0.2)


@METHODS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_counts_the_packed_weights(method: str, checkpointing: bool, base: Path, tmp_path: Path) -> None:
    given = recipe(tmp_path / "out", base, bf16=True, gradient_checkpointing=checkpointing)
    found = estimate_memory(given, to_sft_config(given), model_shape(given), Dataset.from_list(ROWS))
    model: Any = load_model(given)[0]
    buffers = [tensor for name, tensor in model.named_buffers() if "wf_" not in name]
    assert found is not None
    assert found.weights == pytest.approx(sum(t.nbytes for t in (*model.parameters(), *buffers)), rel=0.02)
    if not checkpointing:
        backbone = model.base_model.model.model
        tensors = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
        with torch.autocast("cpu", torch.bfloat16):
            saved, _ = memory._saved_by_autograd(backbone.train(), tensors, *SHAPE)
        assert found.activations == pytest.approx(saved, rel=0.15)  # AQLM keeps a copy of each input


@METHODS
def test_a_run_checks_trains_and_evaluates(
    method: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = make_recipe(
        tmp_path,
        base,
        finetuning_type="lora",
        quantization_bit=4,
        do_predict=True,
        max_new_tokens=4,
        eval_dataset="greetings",
    )
    assert train(given).exit_code == 0
    said = capsys.readouterr().out
    assert f"quantization_bit: ignored: the model is already quantized with {method.upper()}" in said
    trained = sum(tensor.numel() for tensor in load_file(tmp_path / "run" / "adapter_model.safetensors").values())
    assert f"{base}: {trained:,} parameters trained beside a quantized base" in said
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    with pytest.raises(RecipeError, match=f"is quantized with {method.upper()}, so it can't be merged"):
        merge(tmp_path / "run", tmp_path / "merged")


@METHODS
def test_a_first_forward_pass_in_eval_mode_keeps_the_gradients(method: str, base: Path, tmp_path: Path) -> None:
    """gptqmodel 7.7 selects a layer's kernel in its first forward pass; in eval mode, one without a backward pass."""
    gradients = []
    for evaluated_first in (False, True):
        model = load_model(recipe(tmp_path / "out", base, bf16=True))[0]
        with torch.autocast("cpu", torch.bfloat16):
            if evaluated_first:
                logits(model)
            model.train()(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any(grad.any() for grad in gradients[0].values())
    assert [name for name, grad in gradients[0].items() if not torch.equal(grad, gradients[1][name])] == []


@METHODS
def test_two_processes_train_as_one_with_twice_the_batch(method: str, base: Path, tmp_path: Path) -> None:
    losses = []
    for processes, rows in (("1", 4), ("2", 2)):
        (tmp_path / processes).mkdir()
        path = write_recipe(
            tmp_path / processes, base, finetuning_type="lora", per_device_train_batch_size=rows, learning_rate=1e-2
        )
        launch(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                processes,
                "-m",
                "arpo_trl",
                str(path),
            ]
        )
        lines = (tmp_path / processes / "run" / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([found["loss"] for line in lines if "loss" in (found := json.loads(line))])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], abs=2e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_saved_by_bitsandbytes_can_be_trained(bits: int, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    saved = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=saved).save_pretrained(base)
    keys = {"bf16": True, "max_steps": 20, "logging_steps": 1, "learning_rate": 1e-2}
    given = recipe(tmp_path / "out", base, **keys)
    found = estimate_memory(given, to_sft_config(given), model_shape(given), Dataset.from_list(ROWS))
    trainer = run(given)
    assert found is not None
    assert found.weights == pytest.approx(sum(p.nbytes for p in trainer.model.parameters()), rel=0.01)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.2
    again = load_model(recipe(tmp_path / "again", base, adapter_name_or_path=str(tmp_path / "out"), **keys))[0]
    assert torch.equal(logits(again, True), logits(trainer.model, True))
    with pytest.raises(RecipeError, match="is quantized with BITSANDBYTES, so it can't be merged"):
        merge(tmp_path / "out", tmp_path / "merged")


@METHODS
def test_an_unknown_target_is_reported_with_the_known_ones(method: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="no module q_prj; expected some of down_proj, embed_tokens, gate_proj, k_proj, "
    ):
        load_model(recipe(tmp_path / "out", base, lora_target="q_prj"))


@METHODS
def test_fsdp_is_an_error_in_one_line(
    method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="is quantized and can't be split by FSDP"):
        load_model(recipe(tmp_path / "by_recipe", base, fsdp="full_shard auto_wrap"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="is quantized and can't be split by FSDP"):
        load_model(recipe(tmp_path / "out", base))


def test_8_bit_codebooks_are_an_error_on_a_cpu(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("aqlm")
    if torch.accelerator.is_available():
        pytest.skip("this machine has a GPU")
    base = pack(tiny_model, tmp_path / "aqlm", "aqlm", nbits_per_codebook=8)
    with pytest.raises(RecipeError, match="no backward pass for 8-bit codebooks on a CPU; use a model with 16"):
        check_after_torch(make_recipe(tmp_path, base, finetuning_type="lora"))
