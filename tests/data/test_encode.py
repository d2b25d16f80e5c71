"""Rows are encoded alike by any number of workers, once the first of them have passed the parity check."""

import multiprocessing
from typing import Any

import pytest
from bench import Bench, answers, numbered, write

from arpo_trl.data import cache
from arpo_trl.data.encode import encode_rows
from arpo_trl.errors import DatasetError


def test_any_number_of_workers_gives_the_same_rows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.add("d", [*numbered(50), 3, *numbered(50, start=50)])
    one = bench.prepare()
    monkeypatch.setattr(cache, "PROCESSES_PAY_FROM", 0)
    pids: set[int] = set()

    def watched(*args: Any) -> Any:
        for batch in encode_rows(*args):
            pids.update(child.pid for child in multiprocessing.active_children() if child.pid)
            yield batch

    monkeypatch.setattr(cache, "encode_rows", watched)
    two = bench.prepare(preprocessing_num_workers=2, preprocessing_batch_size=7, overwrite_cache=True)
    assert one.train[:] == two.train[:] and one.audit == two.audit
    assert len(pids) == 2


def test_several_processes_encode_also_a_dataset_of_the_hub(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (bench.folder / "repo").mkdir()
    write(bench.folder / "repo" / "train.jsonl", numbered(20))
    bench.register("d", hf_hub_url=str(bench.folder / "repo"))
    seen = []

    def watched(*args: Any) -> Any:
        for batch in encode_rows(*args):
            seen.append(len(multiprocessing.active_children()))
            yield batch

    monkeypatch.setattr(cache, "encode_rows", watched)
    monkeypatch.setattr(cache, "PROCESSES_PAY_FROM", 500)
    data = bench.prepare(preprocessing_num_workers=2, preprocessing_batch_size=3)
    assert bench.replies(data.train) == answers(*range(20)) and seen[0] == 2
    seen.clear()
    monkeypatch.setattr(cache, "PROCESSES_PAY_FROM", 50_000)
    bench.prepare(preprocessing_num_workers=2, overwrite_cache=True)
    assert seen == [0]


def test_the_gate_stands_before_every_dataset(bench: Bench) -> None:
    path = bench.add("a", numbered(1))
    own = bench.tokenizer.eos_token
    try:
        bench.tokenizer.eos_token = "<|endoftext|>"
        with pytest.raises(DatasetError) as error:
            bench.prepare()
    finally:
        bench.tokenizer.eos_token = own
    assert str(error.value).startswith(f"{path}:1: the parity check before training failed: a turn does not end in")
