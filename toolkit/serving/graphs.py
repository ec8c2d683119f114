"""Decode steps captured as graphs: on a GPU a step is then one launch, not thousands that Python makes one by one.

A graph holds a number of rows, and a step of fewer is filled up with rows of nobody: they attend to nothing, and what
they store goes to a page that no sequence has. What changes from step to step lies in tensors that keep their place:
tokens, positions, block tables, and the work lists of attention and of the adapters (`toolkit.kernels.fixed`). So one
graph serves whichever requests and adapters come, as long as they work at the same linears and their ranks have room.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from toolkit.kernels.decode_attention.plan import FixedLengths
from toolkit.kernels.fixed import FixedLists, Room
from toolkit.kernels.grouped_lora.fixed import FixedRoutes
from toolkit.kernels.grouped_lora.routes import Routes
from toolkit.kernels.impl import Impl
from toolkit.kernels.paging import PagedBatch
from toolkit.serving.memory import Memory
from toolkit.serving.passes import Part, forward, slots
from toolkit.serving.sites import PLAIN, BatchAdapters, LinearGroup, Rows

MOST_GRAPHS = 64
"""Graphs that are kept; each holds its outputs and work lists, and all share the memory of what is between."""

LEAST_PAGES = 16
"""Width of the smallest block tables; larger ones are powers of two."""

logger = logging.getLogger(__name__)


class Capture(Protocol):
    """A run of a function that can be repeated without it, on whatever its tensors hold by then."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        """Run the function once as it is, then capture it."""

    def replay(self) -> torch.Tensor:
        """Do the same again, and return the same tensor."""
        ...


class CudaCapture:
    """A CUDA graph on the current device."""

    _pool: Any = None

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # compiles kernels, which cannot be done while capturing
        torch.cuda.current_stream().wait_stream(side)
        if CudaCapture._pool is None:
            CudaCapture._pool = torch.cuda.graph_pool_handle()
        self._graph = torch.cuda.CUDAGraph()
        # Adapters are copied to the device by other threads at the same time.
        with torch.cuda.graph(self._graph, pool=CudaCapture._pool, capture_error_mode="thread_local"):
            self._output = run()

    def replay(self) -> torch.Tensor:
        """See `Capture`."""
        self._graph.replay()
        return self._output


def capture_for(device: torch.device) -> type[Capture] | None:
    """Return what captures on a device; nothing does on a CPU."""
    return CudaCapture if device.type == "cuda" else None


@dataclass(frozen=True)
class _Shape:
    """What has to be the same for two steps to share a graph.

    Attributes:
        rows: of the graph.
        pages: of the longest block table.
        choices: adapters of a row.
        groups: linears that adapters work at, by index, and whether one there does more than add a product.
    """

    rows: int
    pages: int
    choices: int
    groups: tuple[tuple[int, bool], ...]


class DecodeGraphs:
    """The graphs of one model.

    Args:
        model: loaded with the toolkit's attention.
        memory: with one page more than requests are given, the last.
        batch: the running step's rows, which the model's modules read.
        groups: all linears that adapters work at, in an order in which new ones come last.
        impl: form of the operations; of those there are, only the Triton form can be captured.
        capture: what captures.

    Attributes:
        num_replayed: steps that were replayed.
        refused: why the model cannot be captured; empty where it can, as far as is known.
    """

    def __init__(
        self,
        model: Any,
        memory: Memory,
        batch: BatchAdapters,
        groups: Callable[[], Sequence[LinearGroup]],
        impl: Impl | None = None,
        *,
        capture: type[Capture],
    ) -> None:
        self.model, self.memory, self.batch = model, memory, batch
        self.impl: Impl | None = impl
        self.num_replayed, self.refused = 0, ""
        self._groups, self._capture = groups, capture
        self._wanted: Counter[_Shape] = Counter()
        self._steps: dict[_Shape, list[_Step]] = {}

    @property
    def num_captured(self) -> int:
        """Graphs that there are."""
        return sum(len(steps) for steps in self._steps.values())

    def logits(self, parts: Sequence[Part], rows: Rows) -> torch.Tensor | None:
        """Run a step of single tokens, each of which wants its logits.

        Args:
            parts: one token each.
            rows: their adapters.

        Returns:
            `[len(parts), V]` float32; `None` where there is no graph for such a step.
        """
        if self.refused or rows.segments or rows.routed:
            return None
        groups = self._groups()
        shape = _shape_of(parts, rows, groups, self.memory.page_size)
        step = self._find(shape, parts, rows) or self._new(shape, parts, rows, groups)
        if step is None:
            return None
        self.num_replayed += 1
        return step.captured.replay()[: len(parts)].clone()

    def _find(self, shape: _Shape, parts: Sequence[Part], rows: Rows) -> _Step | None:
        known = self._steps.get(shape, [])
        for step in [step for step in known if step.is_outdated]:
            known.remove(step)
        return next((step for step in known if step.change(parts, rows)), None)

    def _new(self, shape: _Shape, parts: Sequence[Part], rows: Rows, groups: Sequence[LinearGroup]) -> _Step | None:
        """Capture a step where such a step was wanted before and there is room."""
        self._wanted[shape] += 1
        if self._wanted[shape] < 2 or self.num_captured >= MOST_GRAPHS:
            return None
        step = _Step(self, shape, parts, rows, [groups[index] for index, _ in shape.groups])
        try:
            step.captured = self._capture(step.run)
        except Exception as error:  # whatever a model's own code does that a graph cannot hold
            self.refused = " ".join(str(error).split())[:200] or type(error).__name__
            logger.warning("decode steps are not captured as graphs: %s", self.refused)
            return None
        self._steps.setdefault(shape, []).append(step)
        return step


class _Step:
    """One graph and the tensors that it reads."""

    captured: Capture

    def __init__(
        self, owner: DecodeGraphs, shape: _Shape, parts: Sequence[Part], rows: Rows, groups: Sequence[LinearGroup]
    ) -> None:
        self._owner, self._shape, self._parts, self._groups = owner, shape, parts, groups
        device = owner.model.device
        self._lengths = FixedLengths(self._all_lengths(parts))
        rooms = {"ids": Room(shape.rows, fill=(0,)), "positions": Room(shape.rows, fill=(0,))}
        rooms |= {"slots": Room(shape.rows, fill=(self._spare,))}
        rooms |= {"tables": Room(shape.rows, shape.pages, (0,) * shape.pages)}
        self._inputs = FixedLists(rooms, self._list_inputs, device, torch.int64)
        self._rows, self._routes = PLAIN, None
        if rows.routes is not None:
            routes = self._filled(rows.routes)
            self._routes = FixedRoutes(routes.slots, routes.weights)
            self._rows = Rows(self._routes, rows.slots)
        self._keep = torch.arange(shape.rows, device=device)
        self._editions = self._upload()

    @property
    def is_outdated(self) -> bool:
        """Whether it reads tables of adapters that have moved."""
        return self._upload() != self._editions

    def change(self, parts: Sequence[Part], rows: Rows) -> bool:
        """Take up another step's work; return whether there is room for it."""
        if self._routes is not None:
            assert rows.routes is not None
            for group, (_, has_extras) in zip(self._groups, self._shape.groups, strict=True):
                if has_extras:
                    rows.routes.check_dora(group.pairs)
            if not self._routes.change(self._filled(rows.routes)):
                return False
        self._parts = parts
        self._lengths.change(self._all_lengths(parts))
        self._inputs.refresh()
        return True

    def run(self) -> torch.Tensor:
        """Return the logits of all rows, `[rows, V]` float32: what is captured."""
        count, tensors = self._shape.rows, self._inputs.tensors
        batch = PagedBatch(
            starts=list(range(count + 1)),
            lengths=self._lengths,
            tables=tensors["tables"],
            first_pages=[None] * count,
            slots=tensors["slots"].flatten(),
            num_decodes=count,
        )
        owner = self._owner
        ids, positions = (tensors[name].view(1, -1) for name in ("ids", "positions"))
        with owner.batch.active(self._rows, self._rows):
            return forward(owner.model, owner.memory, ids, positions, batch, self._keep, owner.impl)

    @property
    def _spare(self) -> int:
        """First slot of the page that nobody has."""
        return (self._owner.memory.num_pages - 1) * self._owner.memory.page_size

    def _upload(self) -> list[int]:
        """Bring the tables of adapters up to date; return which tensors they are."""
        for group in self._groups:
            group.pairs.upload()
        return [group.pairs.tables_edition for group in self._groups]

    def _all_lengths(self, parts: Sequence[Part]) -> list[int]:
        return [part.start + 1 for part in parts] + [0] * (self._shape.rows - len(parts))

    def _list_inputs(self) -> Mapping[str, np.ndarray]:
        size, width = self._owner.memory.page_size, self._shape.pages
        tables = np.zeros((len(self._parts), width), np.int64)
        for row, part in zip(tables, self._parts, strict=True):
            used = part.pages[: part.start // size + 1]
            row[: len(used)] = used
        return {
            "ids": np.array([part.tokens[0] for part in self._parts]),
            "positions": np.array([part.start for part in self._parts]),
            "slots": np.array([slots(part.pages, size, part.start, part.start + 1)[0] for part in self._parts]),
            "tables": tables,
        }

    def _filled(self, routes: Routes) -> Routes:
        """Return the routes with rows of no adapter up to the number of the graph."""
        missing, choices = self._shape.rows - len(routes.slots), routes.slots.shape[1]
        nobody = np.full((missing, choices), -1, np.int64)
        weights = np.concatenate([routes.weights, np.zeros((missing, choices), np.float32)])
        return Routes(np.concatenate([routes.slots, nobody]), weights)


def _shape_of(parts: Sequence[Part], rows: Rows, groups: Sequence[LinearGroup], page_size: int) -> _Shape:
    longest = max(part.start for part in parts) // page_size + 1
    if rows.routes is None:
        return _Shape(row_count(len(parts)), _power(max(longest, LEAST_PAGES)), 0, ())
    used = [
        (index, not (group.slots & rows.slots) <= group.pairs.plain)
        for index, group in enumerate(groups)
        if not group.slots.isdisjoint(rows.slots)
    ]
    choices = rows.routes.slots.shape[1]
    return _Shape(row_count(len(parts)), _power(max(longest, LEAST_PAGES)), choices, tuple(used))


def row_count(wanted: int) -> int:
    """Return the rows of the graph for a step: a power of two, or three quarters of one."""
    power = _power(wanted)
    return power * 3 // 4 if power >= 4 and wanted <= power * 3 // 4 else power


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
