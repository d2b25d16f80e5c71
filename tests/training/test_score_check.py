"""The loss is that of the model's own logits, also for families whose logits TRL's fused head does not compute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from small_pairs import write_pairs
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.tokenizer import load_template
from arpo_trl.errors import RecipeError
from arpo_trl.model.model import load_model
from arpo_trl.recipe import read_recipe
from arpo_trl.run_folder import read_json, read_lines
from arpo_trl.training import score_check
from arpo_trl.training.score_check import check_scores
from arpo_trl.training.setup import check_after_torch, load_rows
from arpo_trl.training.train import make_trainer, train

pytestmark = pytest.mark.filterwarnings("default")  # old models warn of what they are

CAPPED = architectures.BASE | {"lru_width": 64, "block_types": ["recurrent", "attention"], "logits_soft_cap": 5.0}
PADDED = architectures.BASE | architectures.NARROW | {"num_local_experts": 4, "num_experts_per_tok": 2}
PADDED |= {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "moe_intermediate_size": 64}
PADDED |= {"unpadded_vocab_size": 1030, "logits_mup_width_multiplier": 3.0, "sliding_window_size": 16}
UNKNOWN = {"recurrent_gemma": CAPPED, "inkling_text": PADDED}
SEEN = ("llama", "gemma2", "cohere2", "granite", "falcon_h1", "gpt_oss")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each family whose head is unknown, with a model and rows."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        for family, config in UNKNOWN.items():
            patch.setitem(architectures.FAMILIES, family, config)
            folders[family] = make_model(family, tmp_path_factory.mktemp(family))
    return folders


def make_model(family: str, folder: Path) -> Path:
    """Return `folder` with a model whose logits are as large as a trained model's, and rows."""
    model = architectures.make_model(family, folder / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder / "model")
    architectures.write_rows(folder / "data")
    return folder


def recipe_of(folder: Path, out: Path, **keys: Any) -> Any:
    path = architectures.write_recipe(folder, folder / "data", output_dir=str(out), save_strategy="no", **keys)
    return read_recipe(path)


def own_loss(folder: Path, out: Path, **keys: Any) -> float:
    """Return the mean of a loss over the labels, from the model's own forward pass of each row alone."""
    recipe = recipe_of(folder, out, **keys)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    losses: list[Tensor] = []
    for row in prepare_datasets(recipe, load_template(recipe)).train:
        labels = torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        nll = functional.cross_entropy(logits, labels, reduction="none")[labels != -100]
        losses.append(nll * (-nll).exp() if recipe.use_dft_loss else nll)
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("family", UNKNOWN)
@pytest.mark.parametrize(
    "keys",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"finetuning_type": "lora"},
        {"use_dft_loss": True},
    ],
    ids=["full", "lora", "dft"],
)
def test_an_unknown_head_trains_on_the_models_own_logits(
    keys: dict[str, Any], family: str, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = models[family]
    train(recipe_of(folder, tmp_path, **keys))
    first, second = (line["loss"] for line in read_lines(tmp_path / "trainer_log.jsonl"))
    assert first == pytest.approx(own_loss(folder, tmp_path, **keys), abs=1e-4)
    assert second != first if "use_dft_loss" in keys else second < first
    said = (tmp_path / "training.log").read_text(encoding="utf-8")
    assert f"loss     {family}: the fused loss and the model's own logits differ (relative difference" in said


@pytest.mark.parametrize("key", ["padding_free", "packing"])
def test_an_unknown_head_is_exact_in_packed_batches_or_not_supported(
    key: str, models: dict[str, Path], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {key: True, "max_steps": 1}
    folder = models["inkling_text"]
    try:
        train(recipe_of(folder, tmp_path, **keys))
    except RecipeError as error:
        assert "padding-free batch" in str(error)
    else:
        assert read_lines(tmp_path / "trainer_log.jsonl")[0]["loss"] == pytest.approx(
            own_loss(folder, tmp_path), abs=1e-4
        )


def test_an_evaluation_without_training_uses_them_too(models: dict[str, Path], tmp_path: Path) -> None:
    folder = models["recurrent_gemma"]
    train(recipe_of(folder, tmp_path, do_train=False, do_eval=True, eval_dataset="rows"))
    expected = own_loss(folder, tmp_path)
    assert (read_json(tmp_path / "eval_results.json") or {})["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_pairs_are_compared_by_them_on_both_models(models: dict[str, Path], tmp_path: Path) -> None:
    """SimPO's loss has no reference; the sigmoid loss is ln 2 only if policy and reference score alike."""
    folder = models["recurrent_gemma"]
    pairs = write_pairs(tmp_path / "pairs", 4)
    keys = {"stage": "dpo", "dataset": "pairs", "dataset_dir": str(pairs), "max_steps": 1}
    for loss, expected in (("sigmoid", 0.6931), ("simpo", None)):
        train(recipe_of(folder, tmp_path / loss, pref_loss=loss, **keys))
        line = read_lines(tmp_path / loss / "trainer_log.jsonl")[0]
        assert expected is None or line["loss"] == pytest.approx(expected, abs=1e-3)
    recipe = recipe_of(folder, tmp_path / "simpo", pref_loss="simpo", **keys)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    means = []
    for row in prepare_datasets(recipe, load_template(recipe)).train:
        size = row["seq_lengths"][0]
        labels = torch.tensor(row["labels"][1:size])
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"][:size]])).logits[0, :-1]
        means.append(-float(functional.cross_entropy(logits, labels)))
    assert line["logps/chosen"] == pytest.approx(sum(means) / len(means), abs=1e-3)


@pytest.mark.parametrize(
    "keys",
    [{"use_eaft_loss": True}, {"use_asft_loss": True}, {"precompute_ref_log_probs": True}],
    ids=lambda keys: next(iter(keys)),
)
def test_another_loss_of_an_unknown_head_is_not_supported(
    keys: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    (key,) = keys
    if key == "precompute_ref_log_probs":
        keys = keys | {"stage": "dpo", "dataset": "pairs", "dataset_dir": str(write_pairs(tmp_path / "pairs", 4))}
    with pytest.raises(RecipeError, match=rf"model_name_or_path: not supported: inkling_text: .*{key}"):
        train(recipe_of(models["inkling_text"], tmp_path, **keys))


def test_own_logits_that_do_not_fit_stop_the_run(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_check, "gpu_memory", lambda: 1_000_000)
    with pytest.raises(RecipeError, match=r"not supported: recurrent_gemma: .* needs about .* GB") as error:
        train(recipe_of(models["recurrent_gemma"], tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_two_processes_train_on_them_as_one(models: dict[str, Path], tmp_path: Path) -> None:
    folder = models["recurrent_gemma"]
    recipe_of(folder, tmp_path, per_device_train_batch_size=2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "arpo_trl"]
    done = subprocess.run(
        [*launch, str(folder / "recipe.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("loss     recurrent_gemma: ") == 1
    first = read_lines(tmp_path / "trainer_log.jsonl")[0]["loss"]
    assert first == pytest.approx(own_loss(folder, tmp_path), abs=1e-4)


FAMILIES = [pytest.param(name, marks=[] if name in SEEN else pytest.mark.slow) for name in architectures.FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_head_passes_in_float32_and_bfloat16(family: str, tmp_path: Path) -> None:
    folder = make_model(family, tmp_path)
    for half in (False, True):
        recipe = recipe_of(folder, tmp_path / "run", bf16=half, force_bf16=half)
        args = check_after_torch(recipe)
        data = load_rows(recipe, args)
        trainer = make_trainer(recipe, args, load_model(recipe)[0], data)
        assert check_scores(recipe, trainer) == []
