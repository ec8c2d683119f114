"""Robust Weight Signatures as patches: small files that are added to any fine-tune of a base, scaled, and taken out.

A signature is what training on corrupted data changed of a base, less its projection on what training on clean data
changed (see `toolkit.merge.methods.signatures`). Here it is quantised linearly, to `2^bits - 1` levels around 0 with
one scale per row, so that no entry is off by more than half a step, and stored as a compressed delta: `FOLDER#NAME` is
a model of any merge. `task_arithmetic` with a fine-tune as `base_model` and the patch as a model of some `weight` is
the patched fine-tune.

Cai et al., "Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?", 2023 (arXiv:2302.12480).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.checkpoints.compressed import CompressedDelta, compressed_writer, open_compressed, part_info, part_name
from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.dtypes import DTYPES, Floats, encode
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.reader import MemoryCheckpoint
from toolkit.checkpoints.writer import WeightsWriter, check_free, staged
from toolkit.errors import UnsupportedError
from toolkit.merge.job import Job
from toolkit.merge.methods.signatures import prepare
from toolkit.merge.ops import weighted_sum
from toolkit.merge.plan import Plan, make_plan
from toolkit.merge.stream import Scratch, Stream
from toolkit.progress import track
from toolkit.tables import Report, Table, human_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEVELS, SCALES = DTYPES["I8"], DTYPES["F32"]


@dataclass(frozen=True)
class Signatures(Report):
    """Signatures that were written.

    Attributes:
        path: folder that was written.
        errors: signature -> relative error of quantising it, in the Frobenius norm.
    """

    path: Path = Path()
    errors: Mapping[str, float] = field(default_factory=dict)


def write_signatures(
    base: object,
    clean: object,
    corrupt: Mapping[str, object],
    out: str | Path,
    *,
    keep_layers: int | None = None,
    bits: int = 8,
    overwrite: bool = False,
    quiet: bool = False,
) -> Signatures:
    """Write the signatures of kinds of corruption as patches.

    Args:
        base: model that all others started from.
        clean: fine-tune on clean data.
        corrupt: fine-tunes of the same task on corrupted data, by the name of the corruption.
        out: folder to write; it appears only when it is whole.
        keep_layers: layers of each stack that are patched, the first ones, with the embeddings; by default everything.
        bits: of every entry's level, 2 to 8; each is stored in a byte.
        overwrite: replace `out` if it exists.
        quiet: show no progress.

    Raises:
        SpecError: models that cannot be read, or do not fit together.
        UnsupportedError: a number of bits that cannot be stored, or signatures without an entry.
        OutputError: `out` exists, or cannot be written.
    """
    if not 2 <= bits <= 8:
        raise UnsupportedError(f"bits is {bits}; a level takes 2 to 8")
    check_free(Path(out), overwrite=overwrite)
    with ExitStack() as stack:
        made = {name: _Signature(_plan(base, clean, model, keep_layers), name, bits) for name, model in corrupt.items()}
        for signature in made.values():
            stack.callback(signature.plan.inputs.close)
        parts = [part for signature in made.values() for part in signature.parts()]
        if not parts:
            raise UnsupportedError("nothing is left of the signatures; raise keep_layers, or check the models")
        source = next(iter(made.values())).plan.inputs.models[0].weights.source
        tasks = {name: signature.plan.inputs.models[1].weights.source for name, signature in made.items()}
        settings = {"bits": bits, "keep_layers": keep_layers}
        with staged(Path(out), overwrite=overwrite) as partial:
            with compressed_writer(
                partial, parts, kind="signature", base_model=source, tasks=tasks, settings=settings
            ) as writer:
                total = sum(len(signature.jobs) for signature in made.values())
                with track("signatures", total, unit="tensors", quiet=quiet) as progress:
                    for signature in made.values():
                        for job in signature.jobs:
                            signature.write(writer, job)
                            progress.advance()
            size = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    return _report(Path(out), made, size)


def _plan(base: object, clean: object, corrupt: object, keep_layers: int | None) -> Plan:
    models = [
        {"model": clean, "parameters": {"role": "clean"}},
        {"model": corrupt, "parameters": {"role": "corrupt"}},
    ]
    parameters = {} if keep_layers is None else {"keep_layers": keep_layers}
    return make_plan({"merge_method": "signatures", "base_model": base, "models": models, "parameters": parameters})


class _Signature:
    """One signature, read tensor by tensor."""

    def __init__(self, plan: Plan, name: str, bits: int) -> None:
        self.plan, self.name, self.largest = plan, name, 2 ** (bits - 1) - 1
        self.scratch = Scratch()
        self.factors: dict[str, list[float]] = {}
        self.jobs: list[Job] = []
        self.square = self.error = 0.0
        for job in plan.jobs:
            if job.action == "merge":
                factors = prepare(self._stream(job), job.params)  # pyright: ignore[reportArgumentType]  # its own
                if factors[1]:
                    # The method adds the signature to the clean model, which is no part of the patch.
                    self.factors[job.tensor.name] = [factors[0] - 1, factors[1]]
                    self.jobs.append(job)

    def _stream(self, job: Job) -> Stream:
        return Stream(job, self.plan.method, self.scratch)

    def parts(self) -> Iterator[TensorInfo]:
        """Yield the header entries."""
        for job in self.jobs:
            info = TensorInfo(job.tensor.name, LEVELS, job.tensor.shape)
            yield part_info(job.tensor.name, "levels", self.name, info)
            yield TensorInfo(part_name(job.tensor.name, "scale", self.name), SCALES, (_rows(job.tensor.shape),))

    def write(self, writer: WeightsWriter, job: Job) -> None:
        """Write the levels and the scales of a tensor."""
        name, shape = job.tensor.name, job.tensor.shape
        scales = self._scales(job)
        width = prod(shape) // len(scales)
        writer.write(part_name(name, "scale", self.name), 0, encode(scales.copy(), SCALES))
        for start, values in self._slices(job):
            step = scales[np.arange(start, start + len(values)) // width]
            levels = np.rint(np.divide(values, step, out=np.zeros_like(values), where=step > 0)).astype(np.int8)
            writer.write(part_name(name, "levels", self.name), start, levels.view(np.uint8))
            self.square += float(np.square(values, dtype=np.float64).sum())
            self.error += float(np.square(levels * step - values, dtype=np.float64).sum())

    def _scales(self, job: Job) -> Floats:
        """Return the step of every row: its largest entry has the largest level."""
        count = _rows(job.tensor.shape)
        width = job.tensor.count // count
        largest = np.zeros(count, np.float32)
        for start, values in self._slices(job):
            np.maximum.at(largest, np.arange(start, start + len(values)) // width, np.abs(values))
        return largest / np.float32(self.largest)

    def _slices(self, job: Job) -> Iterator[tuple[int, Floats]]:
        for start, x in self._stream(job).stacked():
            yield start, weighted_sum(x, self.factors[job.tensor.name])

    @property
    def relative_error(self) -> float:
        """Relative error of what was written."""
        return sqrt(self.error / self.square) if self.square else 0.0


def _rows(shape: Sequence[int]) -> int:
    return prod(shape[:-1]) if len(shape) > 1 else 1


def _report(out: Path, made: Mapping[str, _Signature], size: int) -> Signatures:
    errors = {name: signature.relative_error for name, signature in made.items()}
    full = len(made) * sum(job.tensor.nbytes for job in next(iter(made.values())).plan.jobs)
    numbers: dict[str, Any] = {"path": str(out), "bytes": size, "bytes_of_models": full, "relative_error": errors}
    rows = [[name, len(made[name].jobs), f"{error:.3g}"] for name, error in errors.items()]
    title = f"{human_bytes(full)} of models as {human_bytes(size)}, {full / size:.1f} times smaller"
    return Signatures(numbers, [Table(("signature", "patched tensors", "relative error"), rows, title)], out, errors)


@contextmanager
def patched(model: PreTrainedModel, patches: Mapping[str, float]) -> Iterator[None]:
    """Add patches to a model's weights inside the block; after it they are what they were, bit for bit.

    Args:
        model: in memory, of the patches' architecture.
        patches: `FOLDER#NAME` of a compressed delta -> what it is multiplied with; negative to take it out of a model
            that it is in.

    Raises:
        CheckpointError: a patch of another model.
    """
    import torch

    parameters = dict(model.named_parameters())
    base = MemoryCheckpoint(parameters, {}, type(model).__name__)
    kept: dict[str, torch.Tensor] = {}
    try:
        with ExitStack() as stack, torch.no_grad():
            for source, scale in patches.items():
                delta = CompressedDelta(base, stack.enter_context(closing(open_compressed(source))))
                for name in filter(delta.touches, parameters):
                    value = parameters[name]
                    kept.setdefault(name, value.detach().clone())
                    value.add_(_read(delta, name).to(value.device, value.dtype), alpha=scale)
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


def _read(delta: CompressedDelta, name: str) -> Any:
    """Return a whole change as a float32 tensor."""
    import torch

    info = delta.base.info(name)
    out, own = np.empty(info.count, np.float32), np.empty(info.count, np.float32)
    for start, stop in chunks(info.shape):
        delta.base.read(name, start, stop, own[start:stop])
        delta.read(name, start, stop, own[start:stop], out[start:stop])
    return torch.from_numpy(out).reshape(info.shape)
