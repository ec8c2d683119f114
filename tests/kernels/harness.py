"""What tests of all kernels share: where they run, what they must not read, and how much they move.

Without a GPU kernels run in Triton's interpreter; `tests/conftest.py` asks for it before anything imports triton. On a
machine with one, `TRITON_INTERPRET=0 pytest tests/kernels` runs the same tests there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from toolkit.kernels.launch import INTERPRETED  # noqa: E402 - it imports triton

if INTERPRETED and triton.__version__.startswith("3.6."):
    pytest.skip(
        "the interpreter of triton 3.6 takes numbers out of arrays as numpy no longer allows", allow_module_level=True
    )

DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")

DOT_DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
"""Types that a kernel with `tl.dot` is tested in: the interpreter multiplies the bits of bfloat16."""

ROOT = Path(__file__).parent.parent.parent


class Traffic:
    """What the programs of interpreted kernels ask for of one tensor's elements.

    Attributes:
        loaded: bytes, repetitions included.
        stored: likewise.
        touched: which elements of its storage were loaded.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.first, self.itemsize = storage.data_ptr(), tensor.itemsize
        self.loaded = self.stored = 0
        self.touched = np.zeros(storage.nbytes() // tensor.itemsize, bool)

    def note(self, kind: str, addresses: np.ndarray) -> None:
        """Count an access, as far as it is one to this tensor."""
        elements = (addresses.astype(np.int64) - self.first) // self.itemsize
        own = elements[(elements >= 0) & (elements < self.touched.size)]
        setattr(self, kind, getattr(self, kind) + own.size * self.itemsize)
        if kind == "loaded":
            self.touched[own] = True


@contextmanager
def count_traffic(*tensors: torch.Tensor) -> Iterator[list[Traffic]]:
    """Count what interpreted kernels load and store of some tensors inside the block."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts = [Traffic(tensor) for tensor in tensors]
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(kind: str, pointers, mask) -> None:
        addresses = np.atleast_1d(pointers.data)[np.atleast_1d(mask.data)]
        for traffic in counts:
            traffic.note(kind, addresses)

    def noted_load(self, pointers, mask, *others):
        note("loaded", pointers, mask)
        return load(self, pointers, mask, *others)

    def noted_store(self, pointers, value, mask, *others):
        note("stored", pointers, mask)
        return store(self, pointers, value, mask, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
        yield counts


def mutated(kernel, change: Callable[[str], str]):
    """Return a kernel with a planted fault: its source with a change."""
    import linecache

    import triton

    source = change(kernel.fn.__globals__["__loader__"].get_source(kernel.fn.__module__))
    name = f"<{kernel.fn.__name__} with a fault>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope = {"__name__": kernel.fn.__module__}
    exec(compile(source, name, "exec"), scope)
    assert isinstance(scope[kernel.fn.__name__], type(kernel)), triton.__version__
    return scope[kernel.fn.__name__]


def compile_in_process(cases: Sequence[str], generation: int, *, whole_table: bool = False) -> list[dict]:
    """Compile the kernels that cases launch, in a process that does not interpret.

    Args:
        cases: functions of `tests.kernels.launches`, which run an operation and return its table.
        generation: of GPUs.
        whole_table: with every configuration of the operation's table, not only with the chosen ones.

    Returns:
        Per kernel and configuration: its name, constants, registers, stack, shared memory, and why it may spill.
    """
    command = [sys.executable, "-m", "tests.kernels.compiling", str(generation), *cases, *(["--all"] * whole_table)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def check_resources(found: Sequence[dict], shared_memory: int) -> None:
    """Fail on too much shared memory, and on spills for which the table gives no reason."""
    assert found
    for kernel in found:
        assert kernel["shared"] <= shared_memory, kernel
        assert not kernel["stack"] or kernel["spills"], kernel
