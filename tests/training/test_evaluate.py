"""The eval loss is the mean over all labelled tokens of a dataset, however they are batched."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_config import SFTConfig

from arpo_trl.model.methods.eaft import entropy_adaptive
from arpo_trl.model.token_scores import Objective
from arpo_trl.recipe.rules import METRICS
from arpo_trl.run_folder import read_lines
from arpo_trl.training.loss import token_means
from arpo_trl.training.train import train
from arpo_trl.training.trainer import ArpoTrainer

pytestmark = small_run.QUIET


def rows(lengths: list[int]) -> Dataset:
    ids = [[300 + (7 * i + 3 * j) % 90 for j in range(n)] for i, n in enumerate(lengths)]
    return Dataset.from_list([{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids])


SHORT, LONG = rows([4, 5, 30, 6, 28]), rows([40, 3, 50])


def evaluate(
    model: Path, folder: Path, datasets: Any, batch: int = 2, objective: Objective | None = None, **changes: Any
) -> dict[str, float]:
    values: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_length": None,
        "gradient_checkpointing": None,
        "disable_tqdm": True,
    }
    args = SFTConfig(
        output_dir=str(folder),
        per_device_eval_batch_size=batch,
        dataset_kwargs={"skip_prepare_dataset": True},
        **values | changes,
    )
    trainer = ArpoTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=args,
        train_dataset=SHORT,
        eval_dataset=datasets,
        processing_class=AutoTokenizer.from_pretrained(model),
        objective=objective,
    )
    return trainer.evaluate()


def token_losses(model: Path, dataset: Dataset) -> list[float]:
    """-log p of every labelled token, row by row, from the model's own logits."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    losses: list[float] = []
    for row in dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            log_probs = network(ids).logits[0].log_softmax(-1)
        losses += [-log_probs[i - 1, labels[i]].item() for i in range(1, len(labels)) if labels[i] != -100]
    return losses


@pytest.mark.parametrize(
    ("batch", "changes"),
    [
        (1, {}),
        (2, {}),
        (8, {}),
        (2, {"padding_free": True}),
        (2, {"loss_type": "dft"}),
        (2, {"objective": partial(entropy_adaptive, alpha=1.0)}),
        pytest.param(
            2,
            {"label_smoothing_factor": 0.3},
            marks=pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning"),
        ),
    ],
)
def test_the_eval_loss_is_a_mean_over_tokens_for_any_batch_size_and_training_loss(
    batch: int, changes: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    losses = token_losses(tiny_model, SHORT)
    metrics = evaluate(tiny_model, tmp_path, SHORT, batch, **changes)
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert 0 <= metrics["eval_mean_token_accuracy"] <= 1 < metrics["eval_entropy"]


def test_the_mean_over_batches_differs(tiny_model: Path) -> None:
    rows = [token_losses(tiny_model, SHORT.select([i])) for i in range(len(SHORT))]
    of_rows = sum(sum(row) / len(row) for row in rows) / len(rows)
    of_tokens = sum(map(sum, rows)) / sum(map(len, rows))
    assert of_rows != pytest.approx(of_tokens, rel=1e-4)


def test_several_datasets_have_their_losses_and_one_over_all_tokens(tiny_model: Path, tmp_path: Path) -> None:
    short, long = token_losses(tiny_model, SHORT), token_losses(tiny_model, LONG)
    metrics = evaluate(tiny_model, tmp_path, {"short": SHORT, "long": LONG})
    assert metrics["eval_short_loss"] == pytest.approx(sum(short) / len(short), rel=1e-5)
    assert metrics["eval_long_loss"] == pytest.approx(sum(long) / len(long), rel=1e-5)
    both = short + long
    assert metrics["eval_loss"] == pytest.approx(sum(both) / len(both), rel=1e-5)
    assert metrics["eval_long_perplexity"] == pytest.approx(math.exp(metrics["eval_long_loss"]))


def test_evaluation_keeps_no_logits(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor as wide as the vocabulary is larger than the labelled positions of a batch."""
    seen: list[int] = []
    real = torch.log_softmax

    def spy(scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(scores.shape[0])
        return real(scores, *args, **kwargs)

    monkeypatch.setattr(torch, "log_softmax", spy)
    evaluate(tiny_model, tmp_path, SHORT)
    assert sum(seen) == 68 and len(seen) == 3


@pytest.fixture(scope="module")
def watched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that evaluates two datasets at every step, whose learning rate makes each step worse than the first."""
    return small_run.run(
        tmp_path_factory.mktemp("watched"),
        tiny_model,
        eval_dataset="counting,greetings",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=12,
        learning_rate=3.0,
        warmup_steps=0,
        load_best_model_at_end=True,
        early_stopping_steps=2,
    )


def test_early_stopping_keeps_the_best_weights(watched: Path) -> None:
    log = [line for line in read_lines(watched / "trainer_log.jsonl") if "eval_loss" in line]
    losses = {line["current_steps"]: line["eval_loss"] for line in log}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 2 < 12
    state = json.loads((watched / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_global_step"] == best
    results = json.loads((watched / "eval_results.json").read_text(encoding="utf-8"))
    assert results["eval_loss"] == losses[best]
    assert f"best     step {best}" in (watched / "training.log").read_text(encoding="utf-8")


def test_the_final_evaluation_has_a_perplexity_per_dataset(watched: Path) -> None:
    results = json.loads((watched / "all_results.json").read_text(encoding="utf-8"))
    names = {f"eval_{part}{what}" for part in ("", "counting_", "greetings_") for what in ("loss", "perplexity")}
    assert names <= results.keys() and "train_loss" in results


def test_a_model_can_be_evaluated_without_training(
    watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_run.make_recipe(
        tmp_path,
        watched,
        do_train=False,
        do_eval=True,
        dataset=None,
        eval_dataset="counting,greetings",
        report_to="wandb",
        save_safetensors=True,
    )
    monkeypatch.delenv("WANDB_MODE")  # nobody is logged in: an evaluation tells no tracker, and needs no login
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trainer_state.json").write_text('{"best_model_checkpoint": "of an earlier run"}')
    result = train(recipe)
    assert (result.exit_code, result.best_checkpoint) == (0, None)
    log = (tmp_path / "run" / "training.log").read_text(encoding="utf-8")
    assert "save_safetensors: ignored" in log and "eval counting loss" in log
    found = json.loads((tmp_path / "run" / "eval_results.json").read_text(encoding="utf-8"))
    expected = json.loads((watched / "eval_results.json").read_text(encoding="utf-8"))
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=0.02)  # saved in bfloat16
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_an_evaluation_may_drop_all_rows(tiny_model: Path, tmp_path: Path) -> None:
    """Of one row, which is less than a batch."""
    keys = {"val_size": 1, "do_eval": True, "dataloader_drop_last": True, "max_steps": 1}
    run = small_run.run(tmp_path, tiny_model, per_device_eval_batch_size=2, **keys)
    assert "eval_loss" in json.loads((run / "all_results.json").read_text(encoding="utf-8"))


def test_evaluation_batches_are_at_most_as_large_as_training_batches(tiny_model: Path, tmp_path: Path) -> None:
    run = small_run.run(tmp_path, tiny_model, val_size=0.25, do_eval=True, per_device_train_batch_size=1, max_steps=1)
    args = torch.load(run / "training_args.bin", weights_only=False)
    assert args.per_device_eval_batch_size == 1


@pytest.mark.slow
def test_two_processes_compute_the_same_losses_and_one_writes(tiny_model: Path, tmp_path: Path) -> None:
    """5 and 12 rows over 2 processes of 2: rows that fill up the last batch do not count."""
    changes = {"eval_dataset": "counting,greetings", "do_eval": True, "eval_strategy": "steps", "eval_steps": 2}
    alone = small_run.run(tmp_path / "alone", tiny_model, **changes, per_device_train_batch_size=4)
    recipe = small_run.make_recipe(tmp_path / "two", tiny_model, **changes)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "arpo_trl"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    shown = subprocess.run(
        [*launch, str(recipe.path)], env=env, capture_output=True, text=True, timeout=300, check=True
    ).stdout
    two = tmp_path / "two" / "run"
    expected, found = (read_lines(folder / "trainer_log.jsonl") for folder in (alone, two))
    assert [line["current_steps"] for line in found] == [line["current_steps"] for line in expected]
    for a, b in zip(expected, found, strict=True):
        for name in a.keys() & {"loss", "eval_loss", "eval_counting_loss", "eval_greetings_loss", "trained_tokens"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
    assert shown.count("done     in") == 1 and shown.count("model    ") == 2


def test_the_best_model_can_be_chosen_by_any_eval_metric() -> None:
    assert {f"eval_{name}" for name in METRICS} == token_means(torch.ones(4), "eval").keys()
