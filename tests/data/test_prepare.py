"""From what a recipe names to its train and eval datasets."""

from typing import Any

import pytest
from bench import Bench, answers, numbered

from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.errors import DatasetError


def test_datasets_are_joined_in_their_order_and_cut_to_max_samples(bench: Bench) -> None:
    bench.add("a", numbered(3))
    bench.add("b", numbered(3, start=10))
    assert bench.replies(bench.prepare(max_samples=2).train) == answers(0, 1, 10, 11)
    assert bench.replies(bench.prepare(dataset=["b", "a"], max_samples=1).train) == answers(10, 0)


def test_interleaving_stops_with_the_shortest_or_with_the_longest_or_takes_each_row_once(bench: Bench) -> None:
    bench.add("a", numbered(4))
    bench.add("b", numbered(2, start=10))
    under = bench.replies(bench.prepare(mix_strategy="interleave_under").train)
    assert under == answers(0, 10, 1, 11)
    over = bench.replies(bench.prepare(mix_strategy="interleave_over").train)
    assert set(over) == set(answers(0, 1, 2, 3, 10, 11)) and len(over) == 8
    once = bench.replies(bench.prepare(mix_strategy="interleave_once").train)
    assert once == answers(0, 10, 1, 11, 2, 3)
    keys: dict[str, Any] = {"mix_strategy": "interleave_over", "interleave_probs": [0.9, 0.1]}
    shares = bench.replies(bench.prepare(**keys).train)
    assert shares == bench.replies(bench.prepare(**keys).train)
    assert shares != bench.replies(bench.prepare(**keys, seed=1).train)


def test_num_samples_are_drawn_at_random_and_again_if_there_are_fewer(bench: Bench) -> None:
    bench.add("a", numbered(5), num_samples=3)
    bench.add("b", numbered(2, start=10), num_samples=5)
    drawn = bench.replies(bench.prepare().train)
    assert len(set(drawn[:3])) == 3 and set(drawn[:3]) <= set(answers(*range(5)))
    assert sorted(drawn[3:]) in (sorted(answers(10, 10, 11, 11, last)) for last in (10, 11))
    assert drawn == bench.replies(bench.prepare().train)
    assert drawn != bench.replies(bench.prepare(seed=7).train)
    assert len(bench.prepare(max_samples=1).train) == 2


@pytest.mark.parametrize(("val_size", "held_out"), [(0.25, 2), (3, 3)])
def test_val_size_is_a_share_or_a_number(val_size: float, held_out: int, bench: Bench) -> None:
    bench.add("a", numbered(8))
    data = bench.prepare(val_size=val_size)
    train, held = bench.replies(data.train), bench.replies(data.eval["validation"])
    assert len(held) == held_out and sorted(train + held) == answers(*range(8))
    assert held == bench.replies(bench.prepare(val_size=val_size).eval["validation"])


def test_a_val_size_of_all_rows_is_refused(bench: Bench) -> None:
    bench.add("a", numbered(3))
    with pytest.raises(DatasetError, match="val_size: 5 of 3 rows leaves nothing on one side"):
        bench.prepare(val_size=5)


def test_eval_datasets_keep_their_names(bench: Bench) -> None:
    bench.add("a", numbered(2))
    bench.add("b", numbered(1, start=10))
    data = bench.prepare(dataset=["a"], eval_dataset=["b"])
    assert bench.replies(data.train) == answers(0, 1)
    assert {name: bench.replies(rows) for name, rows in data.eval.items()} == {"b": answers(10)}
    assert set(data.fingerprints) == {"a", "b"}
    assert len(bench.prepare(dataset=[], eval_dataset=["b"]).train) == 0


def test_a_stream_gives_the_same_rows_and_counts_them_once(bench: Bench) -> None:
    bench.add("a", [*numbered(4), 3])
    bench.add("b", numbered(2, start=10))
    data = bench.prepare(streaming=True, disable_shuffling=True, max_dropped=0.5)
    assert bench.replies(data.train) == answers(0, 1, 2, 3, 10, 11)
    assert bench.replies(data.train) == answers(0, 1, 2, 3, 10, 11)
    assert data.audit.datasets["a"].rows == 5 and len(bench.findings()) == 1
    mixed = bench.prepare(
        streaming=True, disable_shuffling=True, max_dropped=0.5, mix_strategy="interleave_under", val_size=1
    )
    assert bench.replies(mixed.eval["validation"]) == answers(0)
    assert bench.replies(mixed.train) == answers(10, 1, 11)


def test_a_stream_stops_when_too_many_rows_are_dropped(bench: Bench) -> None:
    bench.add("a", [*numbered(4), 3])
    data = bench.prepare(streaming=True, disable_shuffling=True)
    with pytest.raises(DatasetError, match="1 of 5 rows dropped"):
        list(data.train)


def test_a_stream_lists_its_rows_once_there_is_a_run(bench: Bench) -> None:
    """Also those that were read before it, to hold rows out."""
    bench.add("a", [3, *numbered(3), "text"])
    data = prepare_datasets(
        bench.recipe(streaming=True, disable_shuffling=True, max_dropped=0.5, val_size=2), bench.tokenizer
    )
    assert not (bench.folder / "out").exists()
    data.write_audit(bench.folder / "out" / "row_audit.jsonl")
    assert [one["excerpt"] for one in bench.findings()] == ["3", '"text"']
    assert bench.replies(data.train) == answers(2) and len(bench.findings()) == 2


def test_a_stream_is_not_evaluated_on(bench: Bench) -> None:
    bench.add("a", numbered(2))
    with pytest.raises(DatasetError) as error:
        bench.prepare(streaming=True, eval_dataset=["a"])
    assert str(error.value) == (
        "eval_dataset: a: is streamed, since dataset names it too; hold rows out with val_size"
    )
    assert len(bench.prepare(eval_dataset=["a"]).eval["a"]) == 2


def test_an_unknown_name_is_told_with_its_key(bench: Bench) -> None:
    bench.add("a", numbered(2))
    with pytest.raises(DatasetError) as error:
        bench.prepare(dataset=["x"], eval_dataset=["a", "y"])
    there = f"no such dataset in {bench.folder}/dataset_info.json; there are a"
    assert str(error.value).splitlines() == [f"dataset: x: {there}", f"eval_dataset: y: {there}"]
