"""Only complete checkpoints are resumed from; the others are reported, renamed and kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import small_run
import torch
from runs import differing, train
from safetensors.torch import save_file

from arpo_trl.run_folder import list_checkpoints
from arpo_trl.training.checkpoints import FILES, IN_PROGRESS, find_problem, newest_complete_checkpoint

READ_ON_RESUME = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def fill_with_zeros(path: Path) -> None:  # what a file system may leave after a loss of power
    path.write_bytes(bytes(path.stat().st_size))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def expect_problem_at_3(output_dir: Path) -> str:
    """checkpoint-3 is renamed with all its files, and checkpoint-2 is used."""
    before = sorted(p.name for p in (output_dir / "checkpoint-3").iterdir())
    checkpoint, lines = newest_complete_checkpoint(output_dir)
    assert checkpoint == output_dir / "checkpoint-2"
    assert [p.name for p in list_checkpoints(output_dir)] == ["checkpoint-1", "checkpoint-2"]
    assert sorted(p.name for p in (output_dir / "incomplete-checkpoint-3").iterdir()) == before
    (line,) = lines
    assert "checkpoint-3" in line and line.endswith("renamed to incomplete-checkpoint-3") and "\n" not in line
    return line


@pytest.mark.parametrize("listed", [True, False], ids=["ours", "foreign"])
@pytest.mark.parametrize("spoil", [cut_in_half, empty, fill_with_zeros, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", READ_ON_RESUME)
def test_an_incomplete_file_excludes_its_checkpoint(
    name: str, spoil: Callable[[Path], None], listed: bool, output_dir: Path
) -> None:
    """The checkpoint is named, skipped and kept; the one before it is resumed from."""
    spoil(output_dir / "checkpoint-3" / name)
    if not listed:
        (output_dir / "checkpoint-3" / FILES).unlink()
    assert name in expect_problem_at_3(output_dir) or name == "model.safetensors"


@pytest.mark.parametrize("name", ["training_args.bin", "config.json", "tokenizer.json"])
def test_a_file_that_a_resume_does_not_read_is_checked_too(name: str, output_dir: Path) -> None:
    """The checkpoint is skipped: it would not load as a model."""
    cut_in_half(output_dir / "checkpoint-3" / name)
    assert name in expect_problem_at_3(output_dir)


def test_a_flipped_byte_in_the_optimizer_is_detected(output_dir: Path) -> None:
    """The checkpoint is skipped: a zip has checksums."""
    path = output_dir / "checkpoint-3" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "optimizer.pt is corrupt" in expect_problem_at_3(output_dir)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trainer_state.json", "[]"),
        ("trainer_state.json", '{"global_step": 2}'),
        ("trainer_state.json", "[" * 100_000),
        (FILES, "not JSON"),
        (FILES, "[]"),
        (FILES, '{"model.safetensors": "many"}'),
        (FILES, '{"there_once_was.pt": 4}'),
    ],
)
def test_a_wrong_file_list_or_state_excludes_its_checkpoint(name: str, text: str, output_dir: Path) -> None:
    """The checkpoint is named, skipped and kept."""
    (output_dir / "checkpoint-3" / name).write_text(text, encoding="utf-8")
    expect_problem_at_3(output_dir)


def test_a_killed_save_is_skipped(output_dir: Path) -> None:
    """The checkpoint is named, skipped and kept."""
    (output_dir / "checkpoint-3" / IN_PROGRESS).touch()
    assert "its save was interrupted" in expect_problem_at_3(output_dir)


def test_an_empty_folder_is_skipped(output_dir: Path) -> None:
    """The folder is named, skipped and kept."""
    shutil.rmtree(output_dir / "checkpoint-3")
    (output_dir / "checkpoint-3").mkdir()
    expect_problem_at_3(output_dir)


def test_a_model_without_its_optimizer_is_not_resumed(output_dir: Path) -> None:
    """save_only_model leaves no optimizer: the learning rate would start again, without a word."""
    folder = output_dir / "checkpoint-3"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", FILES):
        (folder / name).unlink()
    checkpoint, (line,) = newest_complete_checkpoint(output_dir)
    assert checkpoint == output_dir / "checkpoint-2"
    assert "it contains the model only" in line and line.endswith("renamed to model-only-checkpoint-3")
    assert (output_dir / "model-only-checkpoint-3" / "model.safetensors").exists()


def shard(folder: Path, listed: bool) -> None:
    """Store the weights in two files with an index, as a model above 50 GB has them."""
    weights = small_run.read_weights(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index = {name: f"model-{1 + (i % 2):05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        save_file({n: weights[n] for n in names if index[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if listed:
        sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != FILES}
        (folder / FILES).write_text(json.dumps(sizes))
    else:
        (folder / FILES).unlink()


@pytest.mark.parametrize("listed", [True, False], ids=["ours", "foreign"])
@pytest.mark.parametrize("spoil", [cut_in_half, append, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "model.safetensors.index.json"])
def test_an_incomplete_shard_excludes_its_checkpoint(
    name: str, spoil: Callable[[Path], None], listed: bool, output_dir: Path
) -> None:
    """The checkpoint is named, skipped and kept."""
    shard(output_dir / "checkpoint-3", listed)
    assert find_problem(output_dir / "checkpoint-3") is None
    spoil(output_dir / "checkpoint-3" / name)
    line = expect_problem_at_3(output_dir)
    assert name in line or "it has no weights" in line


def test_an_invalid_index_excludes_its_checkpoint(output_dir: Path) -> None:
    """The checkpoint is named, skipped and kept."""
    shard(output_dir / "checkpoint-3", listed=False)
    (output_dir / "checkpoint-3" / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    expect_problem_at_3(output_dir)


def test_three_incomplete_checkpoints_give_three_lines_and_a_fresh_start(output_dir: Path) -> None:
    """All are kept; a name that is taken gets a number."""
    (output_dir / "incomplete-checkpoint-2").mkdir()
    for folder in list_checkpoints(output_dir):
        empty(folder / "scheduler.pt")
    checkpoint, lines = newest_complete_checkpoint(output_dir)
    assert checkpoint is None and len(lines) == 3
    assert lines[1].endswith("renamed to incomplete-checkpoint-2-2")
    assert all((output_dir / f"incomplete-checkpoint-{n}" / "optimizer.pt").exists() for n in ("1", "2-2", "3"))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_resume_past_an_incomplete_checkpoint_writes_it_again(
    sharded: bool, output_dir: Path, saved: Path, tiny_model: Path
) -> None:
    """The run resumes from checkpoint-2 and writes the same checkpoint-3."""
    cut_in_half(output_dir / "checkpoint-3" / "optimizer.pt")
    newest_complete_checkpoint(output_dir)
    if sharded:
        shard(output_dir / "checkpoint-2", listed=True)
    train(output_dir, tiny_model, max_steps=3, save_strategy="steps", save_steps=1)
    assert differing(output_dir / "checkpoint-3", saved / "checkpoint-3") == []
    assert find_problem(output_dir / "checkpoint-3") is None


def test_checking_a_checkpoint_reads_no_pickle(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at a checkpoint runs nothing of it."""
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("pickle.load", None)
    assert find_problem(output_dir / "checkpoint-3") is None
