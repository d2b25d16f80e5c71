"""Fixtures of the faults, and their table: `pytest tests/faults -m '' --fault-table faults.md`."""

from __future__ import annotations

import inspect
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import MakeRecipe as MakeRecipe
from runs import train
from small_run import write_recipe


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run's folder with checkpoint-1, checkpoint-2 and checkpoint-3. Copy it before you touch it."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    train(folder, tiny_model, max_steps=3, save_strategy="steps", save_steps=1)
    return folder


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Begin with Python's own signal handlers, and put them back: a run replaces them."""
    defaults: dict[signal.Signals, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    kept = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def output_dir(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved`."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRecipe:
    """Writes a recipe of 4 steps over 8 rows, with changes, and returns its path; its output_dir is tmp_path/run."""
    from datasets import config

    cache = str(tmp_path.parent / "datasets_cache")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", Path(cache))
    monkeypatch.setenv("HF_DATASETS_CACHE", cache)
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"instruction": f"count to {n}", "output": " ".join(map(str, range(n)))} for n in range(2, 10)]
    (data / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (data / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}', encoding="utf-8")

    def make(**changes: Any) -> Path:
        values = {"dataset": "rows", "dataset_dir": str(data), "preflight": False}
        return write_recipe(tmp_path, tiny_model, **values | changes)

    return make


# --- the table ---


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", help="write fault, promise and result of each test here, as Markdown")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fault-table", None):
        config.pluginmanager.register(_FaultTable(Path(config.getoption("--fault-table"))))


class _FaultTable:
    def __init__(self, path: Path) -> None:
        self.path, self.promises, self.rows = path, {}, []  # type: ignore[var-annotated]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if isinstance(item, pytest.Function):
                self.promises[item.nodeid] = inspect.getdoc(item.function) or ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            module, _, name = report.nodeid.rpartition("/")[2].partition("::")
            name, _, case = name.removeprefix("test_").partition("[")
            promise = " ".join(self.promises.get(report.nodeid, "").split())
            fault = f"{module[5:-3]}: {case.rstrip(']')}" if case else f"{module[5:-3]}"
            told = promise or name.replace("_", " ")
            self.rows.append(f"| {fault} | {told} | {report.outcome}, {report.duration:.1f} s |".replace("_", " "))

    def pytest_sessionfinish(self) -> None:
        head = ["| fault | promise | result |", "| --- | --- | --- |"]
        self.path.write_text("\n".join([*head, *self.rows]) + "\n", encoding="utf-8")
