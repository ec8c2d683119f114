"""Batches for one process of a run: of rows in memory, in an order that seed and epoch decide, or of a stream.

The rows of a step are dealt out to the processes one by one, so that all processes together train what a single one
with as many times the batch would. Where rows run out a process fills up with rows from which nothing is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from toolkit.adapters import processes
from toolkit.adapters.spec import TrainSpec
from toolkit.data.batches import batch_order, token_batches
from toolkit.data.groups import Item, blank
from toolkit.errors import Problem


class Rows(Dataset[Item]):
    """Rows in memory; the number `~i` is a row that only fills a batch, in the shape of row `i`.

    Args:
        items: to train.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index] if index >= 0 else blank(self.items[~index])


class Order(Sampler[list[int]]):
    """This process's rows of every batch in an epoch.

    Args:
        lengths: tokens of each row.
        size: rows of a batch in one process.
        seed: of the order; `None` keeps the rows as they come.
        by_length: put rows of like length into a batch.
        budget: tokens of a batch in one process, padding included, instead of rows.
        tasks: number of each row's task where one task is trained after another.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        size: int,
        *,
        seed: int | None,
        by_length: bool = False,
        budget: int | None = None,
        tasks: Sequence[int] | None = None,
    ) -> None:
        self.lengths, self.size, self.seed, self.by_length = lengths, size, seed, by_length
        self.budget, self.tasks = budget, tasks
        self.epoch = 0
        self._made: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        return len(self.together())

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.together():
            yield dealt(batch, processes.rank(), processes.world())

    def set_epoch(self, epoch: int) -> None:
        """Go to another epoch; the trainer calls this."""
        self.epoch = epoch

    def together(self) -> list[list[int]]:
        """Return the rows of every batch, over all processes."""
        if self._made[0] != self.epoch:
            self._made = (self.epoch, [batch for rows in self._parts() for batch in self._batches(rows)])
        return self._made[1]

    def _parts(self) -> list[list[int]]:
        """Return the rows that share batches: all, or those of one task after another."""
        everything = list(range(len(self.lengths)))
        if self.tasks is None:
            return [everything]
        return [[row for row in everything if self.tasks[row] == task] for task in sorted(set(self.tasks))]

    def _batches(self, rows: list[int]) -> list[list[int]]:
        lengths, world = [self.lengths[row] for row in rows], processes.world()
        if self.budget is not None and self.seed is not None:
            batches = token_batches(lengths, self.budget, share=world, seed=self.seed, epoch=self.epoch)
            return [[rows[i] for i in batch] for batch in batches]
        size, order = self.size * world, list(range(len(rows)))
        if self.seed is not None:
            order = batch_order(lengths, size, seed=self.seed, epoch=self.epoch, by_length=self.by_length)
        return [[rows[i] for i in order[start : start + size]] for start in range(0, len(rows), size)]


def order_of(spec: TrainSpec, rows: Sequence[Item], *, in_sequence: bool = False) -> Order:
    """Return the order in which a spec trains rows in memory.

    Args:
        spec: of the run.
        rows: to train.
        in_sequence: one task after another.

    Raises:
        SpecError: a row is longer than a batch may be.
    """
    lengths, budget = [len(row.tokens) for row in rows], spec.training.batch_tokens
    if budget is not None and max(lengths) > budget:
        message = f"expected at least the {max(lengths)} tokens of the longest row, got {budget}"
        raise spec.error([Problem("training.batch_tokens", message)])
    return Order(
        lengths,
        spec.training.batch_size,
        seed=spec.training.seed,
        by_length=spec.data.batches == "by_length",
        budget=budget,
        tasks=[row.task for row in rows] if in_sequence else None,
    )


def dealt(batch: Sequence[int], rank: int, world: int) -> list[int]:
    """Return one process's rows of a batch, as many for each process."""
    mine = list(batch[rank::world])
    return mine if len(mine) == -(-len(batch) // world) else [*mine, ~batch[0]]


class Steps(IterableDataset[list[Item]]):
    """This process's batches of an endless stream of rows.

    Every process reads the whole stream, and takes its part of every batch. A buffer of rows at a time is put into
    batches; what fills none is kept for the next.

    Args:
        items: yields the rows of one pass after another, in any order.
        size: rows of a batch in one process.
        seed: of the order.
        by_length: put rows of like length into a batch.
        buffer: rows that are read ahead.
        pack: puts several rows into one.
    """

    def __init__(
        self,
        items: Callable[[], Iterator[Item]],
        size: int,
        *,
        seed: int,
        by_length: bool,
        buffer: int,
        pack: Callable[[list[Item]], list[Item]],
    ) -> None:
        self.items, self.size, self.seed, self.by_length = items, size, seed, by_length
        self.buffer, self.pack = buffer, pack

    def __iter__(self) -> Iterator[list[Item]]:
        size, source, number = self.size * processes.world(), self.items(), 0
        held: list[Item] = []
        while True:
            held = [*held, *self.pack([next(source) for _ in range(max(self.buffer, size))])]
            lengths = [len(item.tokens) for item in held]
            order = batch_order(lengths, size, seed=self.seed, epoch=number, by_length=self.by_length)
            full = len(order) - len(order) % size
            for start in range(0, full, size):
                yield [held[i] for i in order[start : start + size][processes.rank() :: processes.world()]]
            held, number = [held[i] for i in order[full:]], number + 1


class Loader(DataLoader[Any]):
    """A loader that passes the number of the epoch on to its order."""

    def set_epoch(self, epoch: int) -> None:
        """Go to another epoch; the trainer calls this."""
        if isinstance(self.batch_sampler, Order):
            self.batch_sampler.set_epoch(epoch)
