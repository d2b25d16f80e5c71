"""Rows are encoded alike by any number of workers, once the first of them have passed the parity check."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from bench import Bench, answers, numbered, write

from arpo_trl.data import cache
from arpo_trl.data.encode import encode_batches
from arpo_trl.errors import DatasetError


@pytest.fixture
def processes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many processes have encoded since it was last asked."""

    def watched(*args: Any) -> Any:
        for batch in encode_batches(*args):
            (bench.folder / f"{os.getpid()}.pid").touch()
            yield batch

    def count() -> int:
        found = list(bench.folder.glob("*.pid"))
        for path in found:
            path.unlink()
        return len(found)

    monkeypatch.setattr(cache, "encode_batches", watched)
    return count


def test_any_number_of_processes_gives_the_same_rows(
    bench: Bench, processes: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.add("d", [*numbered(50), 3, *numbered(50, start=50)])
    one = bench.prepare()
    monkeypatch.setattr(cache, "PROCESSES_PAY_FROM", 0)
    assert processes() == 1
    two = bench.prepare(preprocessing_num_workers=2, preprocessing_batch_size=7, overwrite_cache=True)
    assert one.train[:] == two.train[:] and one.audit == two.audit
    assert processes() == 2


def test_several_processes_encode_also_a_dataset_of_the_hub(
    bench: Bench, processes: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench.folder / "repo").mkdir()
    write(bench.folder / "repo" / "train.jsonl", numbered(20))
    bench.register("d", hf_hub_url=str(bench.folder / "repo"))
    monkeypatch.setattr(cache, "PROCESSES_PAY_FROM", 500)
    data = bench.prepare(preprocessing_num_workers=2, preprocessing_batch_size=3)
    assert bench.replies(data.train) == answers(*range(20)) and processes() == 2
    monkeypatch.setattr(cache, "PROCESSES_PAY_FROM", 50_000)
    bench.prepare(preprocessing_num_workers=2, overwrite_cache=True)
    assert processes() == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_file_reaches_the_user_as_it_is(
    workers: int, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench.add("d", numbered(5), ".json")
    path.write_text(path.read_text()[:-20], encoding="utf-8")
    monkeypatch.setattr(cache, "PROCESSES_PAY_FROM", 0)
    with pytest.raises(DatasetError, match=r"d\.json:\d+: not JSON"):
        bench.prepare(preprocessing_num_workers=workers)


def test_every_dataset_passes_the_parity_check(bench: Bench) -> None:
    path = bench.add("a", numbered(1))
    own = bench.tokenizer.eos_token
    try:
        bench.tokenizer.eos_token = "<|endoftext|>"
        with pytest.raises(DatasetError) as error:
            bench.prepare()
    finally:
        bench.tokenizer.eos_token = own
    assert str(error.value).startswith(f"{path}:1: the parity check before training failed: a turn does not end in")
