"""The order of rows: a function of seed and epoch, whatever the run did before."""

from __future__ import annotations

from itertools import islice

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from arpo_trl.training.order import Endless, EpochOrder

ROWS = list(range(20))


def orders(sampler: object, epochs: list[int]) -> list[list[int]]:
    made = []
    for epoch in epochs:
        torch.rand(epoch + 3)  # what a run draws in between
        made.append(list(EpochOrder(sampler, 7, lambda epoch=epoch: epoch)))  # type: ignore[misc]
    return made


def test_the_order_of_an_epoch_does_not_depend_on_earlier_epochs() -> None:
    lengths = [n % 5 + 1 for n in ROWS]
    for sampler in (RandomSampler(ROWS), LengthGroupedSampler(2, lengths=lengths)):
        first, second = orders(sampler, [0, 1])
        assert sorted(first) == sorted(second) == ROWS and first != second
        assert orders(sampler, [1]) == [second]
    assert orders(SequentialSampler(ROWS), [0, 1]) == [ROWS, ROWS]


def test_a_random_order_is_the_one_of_accelerate() -> None:
    """EpochOrder changes accelerate's order in no epoch."""
    theirs = SeedableRandomSampler(ROWS, data_seed=7)
    for epoch, ours in enumerate(orders(RandomSampler(ROWS), [0, 1, 2])):
        theirs.set_epoch(epoch)
        assert ours == list(theirs)


def test_a_stream_repeats_all_rows_in_another_order() -> None:
    rows = Dataset.from_dict({"n": ROWS}).to_iterable_dataset().shuffle(seed=3, buffer_size=8)
    stream = iter(Endless(rows))
    passes = [[next(stream)["n"] for _ in ROWS] for _ in range(3)]
    assert all(sorted(one) == ROWS for one in passes)
    assert len({tuple(one) for one in passes}) == 3


def test_the_order_of_a_stream_does_not_depend_on_its_workers() -> None:
    """So that their number may change when a run is resumed; two datasets would be two shards, one for each worker."""
    parts = [Dataset.from_dict({"n": [start + n for n in ROWS]}).to_iterable_dataset() for start in (0, 100)]
    rows = concatenate_datasets(parts).shuffle(seed=3, buffer_size=8)
    read = [
        [batch["n"].tolist() for batch in islice(DataLoader(Endless(rows), batch_size=4, num_workers=workers), 13)]
        for workers in (0, 1, 2)
    ]
    assert read[0] == read[1] == read[2]


def test_an_empty_stream_ends() -> None:
    assert list(Endless(Dataset.from_dict({"n": ROWS}).to_iterable_dataset().filter(lambda row: False))) == []
