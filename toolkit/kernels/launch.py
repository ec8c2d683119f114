"""Launch and compile Triton kernels: the only place that does either.

What a kernel is compiled with is data, a `table.json` beside each operation: for each generation of GPUs and each
kernel a list of configurations, of which the last one holds whose bounds the sizes of the problem reach. Nothing here
asks the driver for anything before a kernel is launched, so that importing works on machines without a GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Triton 3.9 warns that the default will change; the kernels want multiplications and additions fused.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from toolkit.errors import UnsupportedError

INTERPRETED: bool = knobs.runtime.interpret
"""Kernels run in Triton's interpreter, on CPU tensors; the environment has to say so before triton is imported."""

_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Generation:
    """What the kernels count on in all GPUs of a generation.

    Attributes:
        multiprocessors: of its largest member.
        shared_memory: bytes that one program may use.
    """

    multiprocessors: int
    shared_memory: int


GENERATIONS = {80: Generation(108, 163 * 1024), 90: Generation(132, 227 * 1024)}
"""By compute capability, `10 * major + minor`."""


@dataclass(frozen=True)
class Configuration:
    """What a kernel is compiled with.

    Attributes:
        constants: compile-time arguments by name.
        num_warps: of one program.
        num_stages: depth of the pipeline of loads.
        max_registers: of a thread; without a bound the assembler spills a few to fit one more program.
        spills: why it may spill registers; a configuration without a reason may not.
        fuse: multiply and add with one rounding; not where results are to be those of another program to the last bit.
    """

    constants: Mapping[str, int]
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    spills: str = ""
    fuse: bool = True

    @property
    def options(self) -> dict[str, int | None]:
        """What triton is told besides the constants."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
            "enable_fp_fusion": self.fuse,
        }


@dataclass(frozen=True)
class Launch:
    """One launch: of what, how many programs, with what."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    configuration: Configuration

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes.

    Attributes:
        registers: per thread.
        stack: bytes per thread, which registers were spilled to.
        shared: bytes of shared memory.
        narrow: load instructions for single elements of two bytes; whatever streams factors or keys should have none.
        fused: instructions that multiply and add float32 with one rounding.
    """

    registers: int
    stack: int
    shared: int
    narrow: int
    fused: int


class Table:
    """The configurations of an operation's kernels, from its file.

    Args:
        path: `{generation: {kernel: [{"from": {size: least}, constant: value, "num_warps": .., "num_stages": ..}]}}`.
    """

    def __init__(self, path: Path) -> None:
        self._rows = {int(key): kernels for key, kernels in json.loads(path.read_text()).items()}

    def choose(self, kernel: str, generation: int, **sizes: int) -> Configuration:
        """Return the last configuration whose bounds the sizes reach."""
        rows = self._rows[generation][kernel]
        fitting = [row for row in rows if all(sizes[name] >= least for name, least in row["from"].items())]
        return _configuration(fitting[-1])

    def kernels(self, generation: int) -> list[str]:
        """Return the kernels that have configurations."""
        return list(self._rows[generation])

    def all(self, kernel: str, generation: int, itemsize: int, bits: int = 0) -> list[Configuration]:
        """Return every configuration of a kernel that elements of that many bytes, or codes of that many bits, have."""
        known = {"bytes": itemsize, "bits": bits}
        found: dict[tuple[tuple[str, int], ...], Configuration] = {}
        for row in self._rows[generation][kernel]:
            others = tuple(sorted(bound for bound in row["from"].items() if bound[0] not in known))
            if all(row["from"].get(name, 0) <= value for name, value in known.items()):
                found[others] = _configuration(row)
        return list(found.values())


def _configuration(row: Mapping[str, Any]) -> Configuration:
    constants = {name: value for name, value in row.items() if name.isupper()}
    options = {name: value for name, value in row.items() if not name.isupper() and name != "from"}
    return Configuration(constants, **options)


def generation_of(device: torch.device) -> int:
    """Return the newest known generation that a device can run; the newest of all for the interpreter.

    Raises:
        UnsupportedError: no kernel runs there.
    """
    if device.type == "cuda":
        return _generation_of_gpu(device.index if device.index is not None else torch.cuda.current_device())
    if _recorders and not _recorders[-1].run:
        return _recorders[-1].generation
    if INTERPRETED:
        return max(GENERATIONS)
    raise UnsupportedError(
        f"Triton kernels do not run on {device.type}; take another form, or set TRITON_INTERPRET=1 before triton is"
        " imported to run them slowly"
    )


@cache
def _generation_of_gpu(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    known = [generation for generation in GENERATIONS if generation <= 10 * major + minor]
    if not known:
        raise UnsupportedError(
            f"the kernels need compute capability {min(GENERATIONS) / 10} or newer, not {major}.{minor}"
        )
    return max(known)


@dataclass(frozen=True)
class _Recorder:
    launches: list[Launch]
    run: bool
    generation: int


_recorders: list[_Recorder] = []


@contextmanager
def record(*, run: bool = True, generation: int = max(GENERATIONS)) -> Iterator[list[Launch]]:
    """List the launches inside the block.

    Args:
        run: else nothing is launched, and any device will do.
        generation: whose configurations are chosen then.
    """
    recorder = _Recorder([], run, generation)
    _recorders.append(recorder)
    try:
        yield recorder.launches
    finally:
        _recorders.remove(recorder)


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], configuration: Configuration) -> None:
    """Start a grid of programs on the device of the first tensor; an empty grid is no launch.

    Args:
        kernel: decorated with `triton.jit`.
        grid: programs along up to three axes.
        arguments: of the kernel, but for the compile-time ones.
        configuration: the compile-time ones, warps and stages.
    """
    if 0 in grid:
        return
    for recorder in _recorders:
        recorder.launches.append(Launch(kernel, grid, arguments, configuration))
    if _recorders and not _recorders[-1].run:
        return
    device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[grid](**arguments, **configuration.constants, **configuration.options)


def compile_for(generation: int, launched: Launch, configuration: Configuration | None = None) -> Resources:
    """Compile what was launched down to machine code of a generation; no GPU is needed.

    Args:
        generation: key of `GENERATIONS`.
        launched: from `record`; its arguments decide types and what is known to be divisible by 16.
        configuration: to compile with instead of the launched one.

    Raises:
        UnsupportedError: in the interpreter, where there is nothing to compile.
    """
    if INTERPRETED:
        raise UnsupportedError("an interpreting process cannot compile; unset TRITON_INTERPRET")
    configuration = configuration or launched.configuration
    given = {**launched.arguments, **configuration.constants}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(launched.kernel.arg_names):
        value = given[name]
        signature[name], divisible = _type_of(value, name in launched.arguments)
        if signature[name] == "constexpr":
            constants[name] = value
        elif divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(launched.kernel, signature, constants, attributes),  # type: ignore[reportArgumentType]
        target=GPUTarget("cuda", generation, 32),
        options=configuration.options,
    )
    registers, stack = _registers(compiled.asm["cubin"])
    narrow = len(re.findall(r"ld\.global(?:\.\w+)*\.b16 ", compiled.asm["ptx"]))
    fused = len(re.findall(r"fma\.rn(?:\.ftz)?\.f32 ", compiled.asm["ptx"]))
    return Resources(registers, stack, compiled.metadata.shared, narrow, fused)


def _type_of(value: Any, is_argument: bool) -> tuple[str, bool]:
    """Return the type of an argument in a signature, and whether it is known to be divisible by 16."""
    if isinstance(value, torch.Tensor):
        return f"*{_NAMES[value.dtype]}", value.data_ptr() % 16 == 0
    if is_argument and isinstance(value, float):
        return "fp32", False
    if not is_argument or isinstance(value, bool) or value == 1:
        return "constexpr", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0


def _registers(cubin: bytes) -> tuple[int, int]:
    """Read with NVIDIA's own tool, which triton brings along, a thread's registers and bytes of stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])
