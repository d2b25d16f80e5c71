"""Rows are encoded the same in batches of any size, once the first of them have passed the parity check."""

import pytest
from bench import Bench, answers, numbered, write

from arpo_trl.errors import DatasetError


def test_batches_of_any_size_give_the_same_rows(bench: Bench) -> None:
    bench.add("d", [*numbered(50), 3, *numbered(50, start=50)])
    expected = bench.prepare()
    assert bench.replies(expected.train) == answers(*range(100))
    for size in (1, 7):
        data = bench.prepare(preprocessing_batch_size=size, overwrite_cache=True)
        assert expected.train[:] == data.train[:] and expected.audit == data.audit


def test_a_dataset_of_the_hub_is_encoded(bench: Bench) -> None:
    (bench.folder / "repo").mkdir()
    write(bench.folder / "repo" / "train.jsonl", numbered(20))
    bench.register("d", hf_hub_url=str(bench.folder / "repo"))
    data = bench.prepare(preprocessing_batch_size=3)
    assert bench.replies(data.train) == answers(*range(20))
    assert data.train["source"][-1] == f"{bench.folder / 'repo'}:20"


def test_the_error_of_a_file_is_raised_unchanged(bench: Bench) -> None:
    path = bench.add("d", numbered(5), ".json")
    path.write_text(path.read_text()[:-20], encoding="utf-8")
    with pytest.raises(DatasetError, match=r"d\.json:\d+: not JSON"):
        bench.prepare()


def test_every_dataset_passes_the_parity_check(bench: Bench) -> None:
    path = bench.add("a", numbered(1))
    own = bench.tokenizer.eos_token
    try:
        bench.tokenizer.eos_token = "<|endoftext|>"
        with pytest.raises(DatasetError) as error:
            bench.prepare()
    finally:
        bench.tokenizer.eos_token = own
    assert str(error.value).startswith(f"{path}:1: turns do not end with the eos token")
