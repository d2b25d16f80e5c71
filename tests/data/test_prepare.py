"""From what a recipe names to its train and eval datasets."""

import json
from typing import Any

import pytest
from bench import Bench, answers, numbered
from datasets import Dataset

from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.template_probe import find_template
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


@pytest.mark.parametrize(("val_size", "held_out"), [(0.25, 2), (0.3, 3), (0.001, 1), (3, 3), (1, 1)])
def test_val_size_holds_out_what_llamafactory_holds_out(val_size: float, held_out: int, bench: Bench) -> None:
    """Its whole way is train_test_split of the rows; the trained ones keep that order."""
    bench.add("a", numbered(8))
    data = bench.prepare(val_size=val_size, seed=7)
    size = int(val_size) if val_size >= 1 else val_size
    expected = Dataset.from_dict({"reply": answers(*range(8))}).train_test_split(test_size=size, seed=7)
    assert bench.replies(data.eval["validation"]) == expected["test"]["reply"][:]
    assert bench.replies(data.train) == expected["train"]["reply"][:] and len(data.eval["validation"]) == held_out


@pytest.mark.parametrize(
    "keys",
    [
        {"dataset": ["a"]},
        {"dataset": ["a", "a"]},
        {"dataset": ["repeated"]},
        {"dataset": ["drawn", "a"]},
        {"dataset": ["a", "b"], "mix_strategy": "interleave_over"},
        {"dataset": ["repeated", "twice"], "mix_strategy": "interleave_once"},
        {"dataset": ["twice"]},
        {"dataset": ["twice", "b"], "max_samples": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
def test_no_held_out_row_is_trained_on(keys: dict[str, Any], streaming: bool, bench: Bench) -> None:
    """However rows are repeated: drawn again, mixed again, named twice, twice in the file; in every epoch of a stream."""
    bench.add("a", numbered(10))
    bench.add("b", numbered(3, start=20))
    bench.add("repeated", numbered(4, start=30), num_samples=20)
    bench.add("drawn", numbered(9, start=40), num_samples=4)
    bench.add("twice", [*numbered(5, start=50), *numbered(5, start=50)])
    if streaming:
        if "max_samples" in keys:
            pytest.skip("a stream has no max_samples")
        keys = {**keys, "streaming": True, "buffer_size": 4}
    data = bench.prepare(**keys, val_size=2)
    held_out = set(bench.replies(data.eval["validation"]))
    for epoch in range(3 if streaming else 1):
        if streaming:
            data.train.set_epoch(epoch)
        trained = bench.replies(data.train)
        assert trained and held_out and not held_out & set(trained)


def test_rows_are_repeated_after_others_are_held_out_and_equal_ones_are_counted(bench: Bench) -> None:
    bench.add("a", numbered(4), num_samples=20)
    data = bench.prepare(val_size=1)
    assert (len(data.train), len(set(bench.replies(data.train)))) == (19, 3) and data.notices == []
    bench.add("a", [*numbered(5), *numbered(5)])
    data = bench.prepare(val_size=3)
    held_out = bench.replies(data.eval["validation"])
    left_out = 2 * len(set(held_out)) - 3
    assert len(data.train) == 7 - left_out
    line = f"val_size: {left_out} rows equal to a held-out row are not trained on"
    assert data.notices == ([line] if left_out else [])
    assert data.fingerprints["validation"] != bench.prepare(val_size=3, seed=1).fingerprints["validation"]


def test_a_val_size_of_all_rows_is_an_error(bench: Bench) -> None:
    bench.add("a", numbered(3))
    with pytest.raises(DatasetError, match="val_size: 5 rows requested, but the datasets have only 3"):
        bench.prepare(val_size=5)


def test_eval_datasets_keep_their_names(bench: Bench) -> None:
    bench.add("a", numbered(2))
    bench.add("b", numbered(1, start=10))
    data = bench.prepare(dataset=["a"], eval_dataset=["b"])
    assert bench.replies(data.train) == answers(0, 1)
    assert {name: bench.replies(rows) for name, rows in data.eval.items()} == {"b": answers(10)}
    assert set(data.fingerprints) == {"a", "b"}
    assert len(bench.prepare(dataset=[], eval_dataset=["b"]).train) == 0


def test_a_stream_yields_the_same_rows_and_counts_them_once(bench: Bench) -> None:
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


def test_a_stream_lists_its_rows_once_a_run_starts(bench: Bench) -> None:
    """Also those that were read before it, to hold rows out."""
    bench.add("a", [3, *numbered(3), "text"])
    data = prepare_datasets(
        bench.recipe(streaming=True, disable_shuffling=True, max_dropped=0.5, val_size=2),
        find_template(bench.tokenizer),
    )
    assert not (bench.folder / "out").exists()
    data.write_audit(bench.folder / "out" / "row_audit.jsonl")
    assert [one["excerpt"] for one in bench.findings()] == ["3"]
    assert bench.replies(data.train) == answers(2)
    assert [one["excerpt"] for one in bench.findings()] == ["3", '"text"']


def test_a_stream_is_not_evaluated_on(bench: Bench) -> None:
    bench.add("a", numbered(2))
    with pytest.raises(DatasetError) as error:
        bench.prepare(streaming=True, eval_dataset=["a"])
    assert str(error.value) == ("eval_dataset: a: not supported with streaming; use val_size")
    assert len(bench.prepare(eval_dataset=["a"]).eval["a"]) == 2


def test_an_unknown_name_is_reported_with_its_key(bench: Bench) -> None:
    bench.add("a", numbered(2))
    with pytest.raises(DatasetError) as error:
        bench.prepare(dataset=["x"], eval_dataset=["a", "y"])
    there = f"no such dataset in {bench.folder / 'dataset_info.json'}; expected a"
    assert str(error.value).splitlines() == [f"dataset: x: {there}", f"eval_dataset: y: {there}"]


def test_a_misspelled_key_is_reported_with_the_mistake_that_it_causes(bench: Bench) -> None:
    bench.add("a", numbered(2), formating="sharegpt", columns={"messages": "conversations"})
    registry = bench.folder / "dataset_info.json"
    entries = json.loads(registry.read_text(encoding="utf-8"))
    del entries["a"]["formatting"]
    registry.write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(DatasetError) as error:
        bench.prepare()
    assert str(error.value).splitlines() == [
        f"{registry}: a.columns.messages: unknown key with formatting: alpaca; it belongs to formatting: sharegpt",
        f"{registry}: a.formating: ignored, unknown key; did you mean formatting?",
    ]
