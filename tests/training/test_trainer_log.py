"""trainer_log.jsonl, the plot and the figures in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import small_run
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, TrainerState

from arpo_trl.machine import peak_memory
from arpo_trl.report.log_file import format_seconds, mean_loss
from arpo_trl.report.loss_plot import plot_loss, smooth
from arpo_trl.run_folder import read_lines
from arpo_trl.training.trainer_log import TrainerLog
from arpo_trl.training.window import Speed, Window, mean_context, mfu_per_token

pytestmark = small_run.QUIET

LLAMA_FACTORY = {
    "current_steps",
    "total_steps",
    "loss",
    "lr",
    "epoch",
    "percentage",
    "elapsed_time",
    "remaining_time",
}
OURS = {
    "elapsed_seconds",
    "grad_norm",
    "mean_token_accuracy",
    "entropy",
    "seen_tokens",
    "trained_tokens",
    "tokens_per_second",
    "trained_tokens_per_second",
    "peak_memory_gb",
}


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.run(
        tmp_path_factory.mktemp("finished"),
        tiny_model,
        num_train_epochs=1,
        max_steps=-1,
        val_size=2,
        do_eval=True,
        preflight=True,
    )


def test_a_log_line_has_the_keys_of_llamafactory_and_ours(finished: Path) -> None:
    lines = [line for line in read_lines(finished / "trainer_log.jsonl") if "loss" in line]
    keys = LLAMA_FACTORY | OURS
    assert [set(line) for line in lines] == [keys - {"remaining_time"}] * 2 + [keys] * 3  # unknown in the first steps
    assert [line["current_steps"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["percentage"] for line in lines] == [20.0, 40.0, 60.0, 80.0, 100.0]
    assert lines[-1]["remaining_time"] == "0:00:00" and lines[-1]["epoch"] == 1
    assert all(line["elapsed_seconds"] > 0 and line["peak_memory_gb"] > 0.01 for line in lines)


def test_token_counts_match_the_audit(finished: Path) -> None:
    audit = json.loads((finished / "run.json").read_text(encoding="utf-8"))["audit"]["counting"]
    last = [line for line in read_lines(finished / "trainer_log.jsonl") if "loss" in line][-1]
    assert 0 < last["trained_tokens"] < last["seen_tokens"] < audit["tokens"]  # two rows were held out
    assert last["trained_tokens"] < audit["trained_tokens"]


def test_a_run_prints_its_start_and_end_reports(finished: Path) -> None:
    text = (finished / "training.log").read_text(encoding="utf-8")
    words = [line.split()[0] for line in text.splitlines()]
    example = words.index("example")
    assert "+" in words[example + 1 : words.index("preflight")]
    assert [*words[: example + 1], *words[words.index("preflight") :]] == [
        "#",
        *"model device data validation: steps disk output example preflight".split(),
        *["step"] * 6,
        "serving",
        "done",
        "model",
    ]
    assert "steps    5: 1 epoch, 2 rows and about" in text


def test_a_truncated_last_line_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"current_steps": 1}\n{"current_st', encoding="utf-8")
    assert read_lines(tmp_path / "log") == [{"current_steps": 1}]
    assert read_lines(tmp_path / "none") == []


def test_the_mean_loss_covers_all_sessions() -> None:
    log = [{"step": 2, "loss": 4.0}, {"step": 2, "eval_loss": 9.0}, {"step": 3, "loss": 1.0}]
    assert mean_loss(TrainerState(global_step=5, log_history=log), unlogged=6.0 + 6.0) == (4 + 4 + 1 + 6 + 6) / 5
    assert mean_loss(TrainerState(global_step=3, log_history=log), unlogged=0.0) == 3.0
    assert mean_loss(TrainerState(), unlogged=0.0) == 0.0


def test_the_first_line_after_a_resume_counts_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """And an evaluation's seconds are not in the line after it."""
    clock = 0.0
    monkeypatch.setattr("arpo_trl.training.window.time.monotonic", lambda: clock)
    window, speed = Window(seen_tokens=1_000_000, trained_tokens=500_000), Speed()
    speed.leave_out(7.0)  # an evaluation before the first step
    speed.start(window, mfu_per_token=0.1)
    clock, window.seen_tokens, window.trained_tokens = 10.0, 1_002_000, 500_500
    figures = speed.take(window)
    assert figures["tokens_per_second"] == 200 and figures["trained_tokens_per_second"] == 50
    assert figures["mfu"] == 20 and figures["seen_tokens"] == 1_002_000
    clock, window.seen_tokens = 20.0, 1_002_600
    speed.leave_out(4.0)
    assert speed.take(window)["tokens_per_second"] == 100


def test_the_figures_of_a_line_are_means_since_the_line_before() -> None:
    window = Window(loss_sum=6.0, last_logged=3, metrics={"entropy": [1.0, 3.0]}, seen_tokens=70)
    assert window.take(5) == {"loss": 3.0, "entropy": 2.0, "num_tokens": 70}
    assert window == Window(last_logged=5, seen_tokens=70)


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "a stream"])
def test_the_remaining_time_is_that_of_the_remaining_tokens_at_the_speed_of_the_steps(
    stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the evaluation before the first step (100 s) and the first step (30 s): then 2 steps take 6 s for 250 tokens.

    150 of 1,000 tokens are left, so 3.6 s. The tokens of a stream are unknown: its 2 steps left take 6 s.
    """
    clock = 0.0
    monkeypatch.setattr("arpo_trl.training.trainer_log.time.monotonic", lambda: clock)
    rows = Dataset.from_dict({"input_ids": [[0] * 100] * 10})
    args = SimpleNamespace(num_train_epochs=1, max_steps=-1)
    trainer: Any = SimpleNamespace(window=Window(seen_tokens=500), train_dataset=None if stream else rows, args=args)
    log = TrainerLog(tmp_path / "log", plot=False, trainer=trainer)
    state: Any = SimpleNamespace(global_step=5, max_steps=10, epoch=1.0, is_world_process_zero=True, log_history=[])
    log.on_train_begin(None, state, None)
    clock = 100.0
    log.on_log(None, state, None, logs={"eval_loss": 1.0})
    figures = {"seen_tokens": 100, "tokens_per_second": 50.0}
    for clock, step, tokens in ((130.0, 6, 600), (134.0, 7, 800), (136.0, 8, 850)):  # noqa: B007 (read by monotonic)
        state.global_step, trainer.window.seen_tokens = step, tokens
        log.on_step_begin(None, state, None)
        log.on_step_end(None, state, None)
        log.on_log(None, state, None, logs={"loss": 1.0, "learning_rate": 1e-3, "num_tokens": 100} | figures)
    lines = read_lines(tmp_path / "log")
    remaining = "0:00:06" if stream else "0:00:04"
    assert [line.get("remaining_time") for line in lines] == [None, None, None, remaining]
    assert lines[1].items() >= figures.items() and not lines[1].keys() & {"learning_rate", "num_tokens"}
    first, second, _, last = capsys.readouterr().out.splitlines()
    assert first.endswith("eval loss 1.0000  0:01:40") and second.endswith("0:02:10")
    assert last.endswith(f"0:02:16 < {remaining}")


def test_seconds_are_formatted_as_hours_minutes_and_seconds() -> None:
    assert [format_seconds(s) for s in (0.2, 59.6, 3600, 360_000)] == ["0:00:00", "0:01:00", "1:00:00", "100:00:00"]


def test_peak_memory_is_measured_without_a_gpu() -> None:
    assert peak_memory() > 10_000_000


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=300))
def test_a_smoothed_curve_stays_between_the_extremes(values: list[float]) -> None:
    smoothed = smooth(values)
    assert len(smoothed) == len(values)
    assert all(min(values) - 1e-6 <= value <= max(values) + 1e-6 for value in smoothed)


# --- the plot ---


def write_log(folder: Path, steps: int, evals: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 1 + 2 * math.exp(-step / 60) + 0.2 * math.sin(step * 2.7)
        lines.append({"current_steps": step, "loss": loss, "lr": 7e-6 * (1 - step / (steps + 1))})
        if step % 50 == 0:
            lines += [{"current_steps": step, name: loss + 0.1 * (i + 1)} for i, name in enumerate(evals)]
    for step in range(100, steps + 1, 100):
        (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
    (folder / "checkpoint-best").mkdir(exist_ok=True)  # a user's own
    log = folder / "trainer_log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return log


@pytest.mark.parametrize(
    ("steps", "evals"),
    [(1, ()), (5, ()), (250, ()), (250, ("eval_loss",)), (250, ("eval_a_loss", "eval_b_loss", "eval_loss"))],
)
def test_a_plot_is_drawn_at_any_length(steps: int, evals: tuple[str, ...], tmp_path: Path) -> None:
    picture = tmp_path / "运行" / "training_loss.png"  # a folder that the plot's font cannot write
    plot_loss(read_lines(write_log(picture.parent, steps, evals)), picture)
    pixels = matplotlib.image.imread(str(picture))
    assert pixels.shape == (540, 960, 4)
    assert (pixels[..., :3].min(axis=-1) < 0.9).sum() > 5_000
    assert list(picture.parent.glob("*.tmp")) == []


def test_an_empty_log_gives_no_plot(tmp_path: Path) -> None:
    plot_loss([], tmp_path / "training_loss.png")
    assert not (tmp_path / "training_loss.png").exists()


# --- MFU ---


def test_the_mean_context_is_weighted_by_tokens() -> None:
    assert mean_context(Dataset.from_dict({"input_ids": [[0] * 2, [0] * 6]})) == 5  # (2 * 2 + 6 * 6) / 8
    packed = Dataset.from_dict({"input_ids": [[0] * 8], "seq_lengths": [[2, 6]]})
    assert mean_context(packed) == 5


def trainer_on(device: str, model: Any) -> Any:
    args = SimpleNamespace(bf16=True, fp16=False, device=torch.device(device), world_size=2)
    unwrap = SimpleNamespace(unwrap_model=lambda m: m)
    rows = Dataset.from_dict({"input_ids": [[0] * 100]})
    return SimpleNamespace(args=args, accelerator=unwrap, model=model, train_dataset=rows)


def test_mfu_counts_six_flops_per_weight_and_token(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model))
    assert mfu_per_token(trainer_on("cpu", model)) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2)
    config = model.config
    attention = (
        12
        * config.num_hidden_layers
        * config.num_attention_heads
        * (config.hidden_size // config.num_attention_heads)
        * 100
    )
    flops = 6 * weights + attention  # PaLM, appendix B; the tied embedding is counted once, as the head
    assert mfu_per_token(trainer_on("cuda", model)) == pytest.approx(100 * flops / (2 * 989e12), rel=1e-6)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "norm" in name
    assert mfu_per_token(trainer_on("cuda", model)) == pytest.approx(100 * flops * 2 / 3 / (2 * 989e12), rel=1e-6)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A device of tomorrow")
    assert mfu_per_token(trainer_on("cuda", model)) is None
