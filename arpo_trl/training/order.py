"""In which order rows are trained on: a function of seed and epoch, so that a resumed run finds it again."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset, Sampler, get_worker_info

Row = dict[str, object]


class EpochOrder(Sampler[int]):
    """The order of a sampler of transformers in the epoch that the run is in.

    accelerate tells a random sampler its epoch, but no other one, and none at all where a resumed run of several
    processes skips batches (accelerate 1.15, `DataLoaderShard.set_epoch`).

    Args:
        sampler: One that draws from its `generator`, or that needs none.
        seed: Of the run. In epoch e the generator is seeded with seed + e, as accelerate does.
        epoch: Tells the epoch, from 0.
    """

    def __init__(self, sampler: Any, seed: int, epoch: Callable[[], int]) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class Endless(IterableDataset[Row]):
    """A stream, again and again; each pass has a shuffle of its own.

    Trainer takes max_steps for the length of a stream's epoch: a resumed run skips the rows that it has seen, as long
    as the stream does not end before them.
    """

    def __init__(self, rows: datasets.IterableDataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        if worker and worker.id:  # a single reader, so that the number of workers does not change the order
            return
        if worker:  # the threads of Rust's tokenizers are not there in a forked process, which would wait for them
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        for turn in itertools.count():
            self.rows.set_epoch(turn)
            batch = None
            for batch in self.rows.iter(batch_size=1):  # iter(self.rows) takes another order in a worker (datasets 5)
                yield {name: values[0] for name, values in batch.items()}
            if batch is None:
                return
