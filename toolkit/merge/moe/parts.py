"""The tensors of a mixture: copies of the base's and the experts', routers, zeros."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from toolkit.checkpoints.dtypes import Bytes, DType, Floats, encode
from toolkit.checkpoints.headers import TensorInfo
from toolkit.merge.job import Place
from toolkit.merge.moe.architectures import PROJECTIONS, Architecture
from toolkit.merge.moe.models import EMBEDDINGS, Models, is_buffer, mlp_name
from toolkit.merge.moe.noise import normals
from toolkit.merge.moe.spec import ExpertSpec, MoeSpec
from toolkit.merge.random import Draws


@dataclass(frozen=True)
class Part:
    """One tensor of the output, of zeros.

    Attributes:
        tensor: name, dtype and shape.
    """

    tensor: TensorInfo

    def read(self, start: int, stop: int, gates: Floats) -> Bytes:
        """Return the bytes of elements `start` to `stop`, one of the tensor's `chunks`.

        Args:
            start: first element, flattened.
            stop: end.
            gates: `[L, G, H]`, what the routers hold.
        """
        return np.zeros(self.tensor.dtype.nbytes(stop - start), np.uint8)


@dataclass(frozen=True)
class Taken(Part):
    """A tensor of one of the models.

    Attributes:
        place: where it is.
        noise: standard deviation of what is added to it.
        scale: factor of the sum.
        draws: random numbers of the noise.
    """

    place: Place
    noise: float = 0.0
    scale: float = 1.0
    draws: Draws = Draws(0, "", 0)

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are taken as they are stored."""
        same = self.place.info.dtype == self.tensor.dtype and not self.noise and self.scale == 1
        return same and self.place.is_stored

    def read(self, start: int, stop: int, gates: Floats) -> Bytes:
        """Return the bytes; sums are float32 and rounded once."""
        if self.is_copy:
            return self.place.read_raw(start, stop)
        values = np.empty(stop - start, np.float32)
        self.place.read(start, stop, values)
        if self.noise:
            values += np.float32(self.noise) * normals(self.draws, start, stop)
        if self.scale != 1:
            values *= np.float32(self.scale)
        return encode(values, self.tensor.dtype)


@dataclass(frozen=True)
class Router(Part):
    """A router, or the gate of a shared expert.

    Attributes:
        layer: of the router.
        rows: which experts' vectors it holds.
    """

    layer: int
    rows: slice

    def read(self, start: int, stop: int, gates: Floats) -> Bytes:
        """Return the bytes."""
        return encode(gates[self.layer, self.rows].reshape(-1)[start:stop].copy(), self.tensor.dtype)


def list_parts(spec: MoeSpec, architecture: Architecture, models: Models, dtype: DType | None) -> Iterator[Part]:
    """Yield the output's tensors in the base's order, those of a mixture where the first tensor of its MLP stood.

    Args:
        spec: checked.
        architecture: of the output.
        models: opened and checked.
        dtype: of the output; by default that of the base's tensors.
    """
    done: set[int] = set()
    for name, info in models.base.tensors.items():
        kind = dtype or info.dtype
        if ".mlp." in name:
            layer = int(name.split(".")[2])
            if layer not in done:
                done.add(layer)
                yield from _mixture(spec, architecture, models, layer, kind)
        elif not is_buffer(name):
            yield Taken(TensorInfo(name, kind, info.shape), Place(models.base, name))
            bias = name.removesuffix("weight") + "bias"
            if bias.partition(".self_attn.")[2] in architecture.biases and bias not in models.base.tensors:
                yield Part(TensorInfo(bias, kind, info.shape[:1]))


def _mixture(spec: MoeSpec, architecture: Architecture, models: Models, layer: int, dtype: DType) -> Iterator[Part]:
    """Yield the tensors that stand for the MLP of one layer."""
    count, hidden = len(spec.experts), models.base.info(EMBEDDINGS).shape[1]
    yield Router(TensorInfo(architecture.router(layer), dtype, (count, hidden)), layer, slice(0, count))
    if architecture.shared_gate:
        yield Router(TensorInfo(architecture.shared_router(layer), dtype, (1, hidden)), layer, slice(count, count + 1))
    for index, (path, expert) in enumerate(spec.slots()):
        for projection in PROJECTIONS:
            if index < count:
                name = architecture.expert(layer, index, projection)
            else:
                name = architecture.shared_expert(layer, projection)
            place = Place(models.experts[path], mlp_name(layer, projection))
            draws = Draws(spec.seed, place.name, index)
            noise, scale = expert.noise_scale or 0.0, _scale(expert, projection)
            yield Taken(TensorInfo(name, dtype, place.info.shape), place, noise, scale, draws)


def _scale(expert: ExpertSpec, projection: str) -> float:
    """Return the factor of a matrix: scaling the last one scales what the expert adds."""
    return 1.0 if projection != "down_proj" or expert.residual_scale is None else expert.residual_scale
