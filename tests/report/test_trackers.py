"""Trackers write inside output_dir, record the run's inputs, and continue the same run when it is resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import small_run

from arpo_trl.errors import RecipeError, RunFailed
from arpo_trl.report.manifest import Manifest
from arpo_trl.report.trackers import start_trackers
from arpo_trl.training import train as train_module
from arpo_trl.training.signals import StopOnSignal

pytestmark = small_run.QUIET

SECRETS = {
    "HF_TOKEN": "hf_" + "Sx7" * 11,
    "WANDB_API_KEY": "4f" * 20,
    "AWS_SECRET_ACCESS_KEY": "wJalr" + "XUtnF" * 7,
    "OPENAI_API_KEY": "sk-" + "q9Z" * 12,
}


def files_that_hold(secrets: dict[str, str], folder: Path) -> list[str]:
    """Files, read byte by byte, that hold one of the secrets."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            found += [f"{path}: {name}" for name, secret in secrets.items() if secret.encode() in data]
    return found


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run, in wandb's own message type.

    wandb 0.31 reads the file in Go only (`wandb leet` shows it). Frames are LevelDB's log format: blocks of 32 KiB;
    checksum, length and kind (1 whole, 2 first, 3 middle, 4 last) before each piece.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, piece = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        piece += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(piece)
            yield record
            piece = b""


def wandb_run(folder: Path) -> tuple[Any, dict[str, Any], list[dict[str, Any]], list[str]]:
    """The run, its config, its history and its files."""
    run: Any = None
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    files: list[str] = []
    for record in wandb_records(next(folder.glob("run-*.wandb"))):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            config |= {update.key: json.loads(update.value_json) for update in record.run.config.update}
        elif kind == "history":
            history.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                | {"_step": record.history.step.num}
            )
        elif kind == "files":
            files += [file.path for file in record.files.files]
    return run, config, history, files


class StopAtTwo(StopOnSignal):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.signum = signal.SIGTERM if state.global_step == 2 else None
        super().on_step_end(args, state, control, **kwargs)


@pytest.fixture(scope="module")
def tracked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run under W&B (offline) and TensorBoard, stopped after its second step and resumed."""
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("tracked")
    changes = {
        "report_to": "wandb,tensorboard",
        "project": "arpo",
        "run_name": "cold start",
        "eval_dataset": "greetings",
        "eval_strategy": "steps",
        "eval_steps": 2,
    }

    variables = "WANDB_MODE WANDB_CACHE_DIR WANDB_DATA_DIR WANDB_ARTIFACT_DIR TENSORBOARD_LOGGING_DIR".split()
    with pytest.MonkeyPatch.context() as patch:
        for name in variables:
            patch.setenv(name, "")  # so that what the run sets is taken back
            patch.delenv(name)
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("HOME", str(folder / "home"))
        patch.setattr(train_module, "StopOnSignal", StopAtTwo)
        with pytest.raises(AssertionError):  # exit code 143
            small_run.run(folder, tiny_model, **changes)
        import wandb

        wandb.finish()  # which a process does when it ends
        patch.setattr(train_module, "StopOnSignal", StopOnSignal)
        small_run.run(folder, tiny_model, **changes)
        wandb.teardown()  # its service has written the files when it has ended
        yield folder


def test_the_wandb_config_has_recipe_audit_and_versions(tracked: Path) -> None:
    folder = sorted((tracked / "run" / "wandb").glob("offline-run-*"))[0]
    run, config, _, _ = wandb_run(folder)
    assert (run.project, run.display_name) == ("arpo", "cold start")
    manifest = json.loads((tracked / "run" / "run.json").read_text(encoding="utf-8"))
    for part in ("recipe", "audit", "versions"):
        assert config[part] == manifest[part]


def test_a_resumed_run_continues_its_wandb_run(tracked: Path) -> None:
    folders = sorted((tracked / "run" / "wandb").glob("offline-run-*"))
    runs = [wandb_run(folder) for folder in folders]
    manifest = json.loads((tracked / "run" / "run.json").read_text(encoding="utf-8"))
    assert [run.run_id for run, *_ in runs] == [manifest["tracker_run"]] * 2
    # The signal came at the end of step 2: its evaluation is the resumed run's.
    for name, expected in (("train/loss", [[1, 2], [3, 4]]), ("eval/loss", [[], [2, 4]])):
        lines = [[line for line in history if name in line] for _, _, history, _ in runs]
        for step in ("_step", "train/global_step"):  # as `wandb sync` sends them: one curve
            assert [[line[step] for line in session] for session in lines] == expected


def test_figures_after_a_resume_cover_the_whole_run(tracked: Path) -> None:
    logged = (tracked / "run" / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, logged) if "loss" in line]
    results = json.loads((tracked / "run" / "train_results.json").read_text(encoding="utf-8"))
    assert results["train_loss"] == pytest.approx(sum(losses) / 4)
    text = (tracked / "run" / "training.log").read_text(encoding="utf-8")
    assert "resuming from checkpoint-2" in text


def test_wandb_gets_our_figures_the_plot_and_the_model_card(tracked: Path) -> None:
    folder = sorted((tracked / "run" / "wandb").glob("offline-run-*"))[1]
    _, _, history, files = wandb_run(folder)
    line = next(line for line in history if "train/loss" in line)
    assert {"train/learning_rate", "train/tokens_per_second", "train/trained_tokens", "train/peak_memory_gb"} <= set(
        line
    )
    assert any(line.get("eval/perplexity") for line in history)
    picture = next(path for path in files if path.endswith(".png"))
    assert matplotlib.image.imread(str(folder / "files" / picture)).shape == (540, 960, 4)
    assert "README.md" in files
    assert (folder / "files" / "README.md").read_bytes() == (tracked / "run" / "README.md").read_bytes()


def test_tensorboard_has_one_curve_for_a_resumed_run(tracked: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    curves = list((tracked / "run" / "runs").iterdir())
    assert len(curves) == 1 and curves[0].name.startswith("cold start-")
    events = accumulator.EventAccumulator(str(curves[0]))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    logged = (tracked / "run" / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    expected = [(line["current_steps"], line["loss"]) for line in map(json.loads, logged) if "loss" in line]
    assert losses == [(step, pytest.approx(loss)) for step, loss in expected] and len(losses) == 4


def test_tensorboard_forgets_the_steps_that_a_resumed_run_repeats(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")

    class DiesAtFour(StopOnSignal):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise MemoryError("killed")

    changes = {"report_to": "tensorboard", "max_steps": 5}
    with monkeypatch.context() as patch, pytest.raises(RunFailed):
        patch.setattr(train_module, "StopOnSignal", DiesAtFour)
        small_run.run(tmp_path, tiny_model, **changes)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4", ignore_errors=True)
    small_run.run(tmp_path, tiny_model, **changes)
    (curve,) = (tmp_path / "run" / "runs").iterdir()
    events = accumulator.EventAccumulator(str(curve))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_trackers_write_no_secret_and_nothing_outside_output_dir(tracked: Path) -> None:
    assert files_that_hold(SECRETS, tracked) == []
    assert files_that_hold({"the recipe's": "cold start"}, tracked)  # the search works
    outside = {path.name for path in tracked.iterdir()} - {"run", "data", "tokenized", "recipe.yaml", "home"}
    left = [p for p in (tracked / "home").rglob("*") if p.is_file() and "matplotlib" not in str(p)]
    assert (outside, left) == (set(), [])


def test_a_failed_wandb_start_is_reported_in_one_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def fail(**kwargs: Any) -> None:
        raise wandb.errors.CommError("Run initialization has timed out\nafter 90 s")

    monkeypatch.setattr(wandb, "init", fail)
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    recipe = small_run.make_recipe(tmp_path, tiny_model, report_to="wandb")
    args: Any = type("Args", (), {"report_to": ["wandb"], "project": "huggingface"})
    with pytest.raises(RecipeError, match=r"timed out after 90 s.*WANDB_MODE=offline") as caught:
        start_trackers(recipe, args, Manifest(recipe={}, data={}, versions={}, day=date.today()), None)
    assert "\n" not in str(caught.value)


def test_without_a_login_the_run_ends_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "no model").mkdir()
    (tmp_path / "no model" / "config.json").write_text("{}", encoding="utf-8")
    recipe = small_run.make_recipe(tmp_path, tmp_path / "no model", report_to="wandb")
    import wandb

    try:
        with pytest.raises(RecipeError, match="wandb login"):
            train_module.train(recipe)
    finally:
        wandb.teardown()  # it keeps the environment of its first use for all later runs of a process
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # 8 s, and needs trackio
def test_trackio_has_one_curve_by_step_for_a_resumed_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "a place"))  # before the import, which reads it
    storage = pytest.importorskip("trackio.sqlite_storage")
    changes = {"report_to": "trackio", "project": "arpo", "val_size": 2, "eval_strategy": "steps", "eval_steps": 2}
    with monkeypatch.context() as patch, pytest.raises(AssertionError):  # exit code 143
        patch.setattr(train_module, "StopOnSignal", StopAtTwo)
        small_run.run(tmp_path, tiny_model, **changes)
    small_run.run(tmp_path, tiny_model, **changes)
    said = [line for line in capsys.readouterr().out.splitlines() if "trackio show" in line]
    assert said == [f"trackio  TRACKIO_DIR='{tmp_path / 'a place'}' trackio show --project arpo"] * 2
    (run,) = storage.SQLiteStorage.get_runs("arpo")
    logs = storage.SQLiteStorage.get_logs("arpo", run)
    assert [line["step"] for line in logs if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in logs if "eval/loss" in line] == [2, 4]


@pytest.mark.slow
def test_trackios_dashboard_shows_the_run(tiny_model: Path, tmp_path: Path) -> None:
    """The page, in headless Chromium: names the run and draws its curves. The picture is kept in tmp_path."""
    pytest.importorskip("trackio")
    chromium = shutil.which("chromium") or pytest.skip("no chromium: apt-get install chromium")
    recipe = small_run.make_recipe(
        tmp_path, tiny_model, report_to="trackio", project="arpo", run_name="cold-start", max_steps=30, logging_steps=1
    )
    env = {k: v for k, v in os.environ.items() if k != "TRACKIO_DIR"}
    env |= {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    subprocess.run([sys.executable, "-m", "arpo_trl", str(recipe.path)], check=True, env=env, timeout=300)
    env["TRACKIO_DIR"] = str(tmp_path / "run" / "trackio")
    assert list(Path(env["TRACKIO_DIR"]).glob("arpo.db"))
    command = [sys.executable, "-c", "from trackio.cli import main; main()", "show", "--project", "arpo"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as dashboard:
        try:
            assert dashboard.stdout is not None
            line = next(line for line in dashboard.stdout if "http://127.0.0.1" in line)
            address = "http://" + line.split("http://")[1].split("/")[0] + "/?project=arpo"
            wait_for(address)
            flags = (
                "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
            )
            flags += " --disable-component-update --disable-sync --window-size=1400,1600 --virtual-time-budget=20000"
            browser = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'chromium'}"]
            picture = tmp_path / "trackio.png"
            page = subprocess.run(
                [*browser, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
            ).stdout
            subprocess.run(
                [*browser, f"--screenshot={picture}", address], capture_output=True, timeout=120, check=True
            )
        finally:
            dashboard.terminate()
    print(picture)
    assert "cold-start-" in page and "tokens_per_second" in page
    pixels = matplotlib.image.imread(str(picture))
    assert pixels[..., :3].std() > 0.05  # not an empty page


def wait_for(address: str) -> None:
    for _ in range(100):
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"{address} does not answer")
