"""What is read for one tensor of a merge's output, and what is done with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from toolkit.checkpoints.deltas import Delta
from toolkit.checkpoints.dtypes import Bytes, Floats
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.reader import Checkpoint
from toolkit.merge.method import MethodParams


@dataclass(frozen=True)
class Place:
    """One tensor of one checkpoint."""

    checkpoint: Checkpoint
    name: str

    @property
    def info(self) -> TensorInfo:
        """What its header says."""
        return self.checkpoint.info(self.name)

    def read(self, start: int, stop: int, out: Floats) -> None:
        """Read a slice as float32; see `Checkpoint.read`."""
        self.checkpoint.read(self.name, start, stop, out)

    @property
    def is_stored(self) -> bool:
        """Whether its bytes are stored, and not computed."""
        return self.checkpoint.is_stored(self.name)

    @property
    def read_bytes(self) -> int:
        """Bytes that one pass reads."""
        return self.checkpoint.read_bytes(self.name)

    def read_raw(self, start: int, stop: int) -> Bytes:
        """Read the stored bytes of a slice."""
        return self.checkpoint.read_raw(self.name, start, stop)


@dataclass(frozen=True)
class Source:
    """What an input gives to one output tensor.

    Attributes:
        place: its own tensor.
        delta: of which this tensor is read as a change of the base's; `None` where it is a difference of weights.
    """

    place: Place
    delta: Delta | None

    @property
    def changes(self) -> bool:
        """Whether it can differ from the base."""
        return self.delta is None or self.delta.touches(self.place.name)

    @property
    def nbytes(self) -> int:
        """Bytes that one pass reads."""
        return self.delta.nbytes(self.place.name) if self.delta else self.place.read_bytes


@dataclass(frozen=True)
class Job:
    """What is done for one output tensor.

    Attributes:
        tensor: name, dtype and shape of the output.
        action: `merge`; or `copy` the donor's bytes, where no input changes the tensor or it is not of numbers
            that can be averaged.
        donor: whose dtype and shape the output has.
        sources: inputs of a merge.
        base: what deltas are taken from.
        params: the method's parameters for this tensor; `None` for a copy.
    """

    tensor: TensorInfo
    action: Literal["merge", "copy"]
    donor: Place
    sources: tuple[Source, ...] = ()
    base: Place | None = None
    params: MethodParams | None = None

    @property
    def places(self) -> list[Place]:
        """The tensors that are read."""
        if self.action == "copy":
            return [self.donor]
        return [source.place for source in self.sources] + ([self.base] if self.base else [])

    @property
    def read_bytes(self) -> int:
        """Bytes that one pass over its inputs reads."""
        if self.action == "copy":
            return self.donor.read_bytes
        return sum(source.nbytes for source in self.sources) + (self.base.read_bytes if self.base else 0)
