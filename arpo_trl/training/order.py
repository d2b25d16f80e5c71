"""The order of the training rows: a function of seed and epoch, so that a resumed run repeats it."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset, Sampler, get_worker_info

Row = dict[str, object]


class EpochOrder(Sampler[int]):
    """Seeds a sampler of transformers by the run's epoch.

    accelerate sets the epoch of a random sampler only, and of none if a resumed run of several processes skips batches
    (accelerate 1.15, `DataLoaderShard.set_epoch`).

    Args:
        sampler: A sampler that draws from its `generator`, or that needs none.
        seed: The run's. In epoch e the generator is seeded with seed + e, as accelerate does.
        epoch: Returns the current epoch, from 0.
    """

    def __init__(self, sampler: Any, seed: int, epoch: Callable[[], int]) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class Endless(IterableDataset[Row]):
    """Repeats a stream, shuffled differently in each pass.

    Trainer takes max_steps as the length of a stream's epoch: a resumed run skips the rows that it has seen, which works
    only if the stream does not end before them.
    """

    def __init__(self, rows: datasets.IterableDataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        if worker and worker.id:  # a single reader, so that the order does not depend on the number of workers
            return
        if worker:  # a forked process lacks the threads of Rust's tokenizers, and would wait for them
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        for turn in itertools.count():
            self.rows.set_epoch(turn)
            batch = None
            for batch in self.rows.iter(batch_size=1):  # iter(self.rows) has another order in a worker (datasets 5)
                yield {name: values[0] for name, values in batch.items()}
            if batch is None:
                return
