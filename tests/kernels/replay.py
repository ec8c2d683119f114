"""A captured graph on a CPU: what a function did is done again, tensor by tensor, without calling the function.

As in a CUDA graph everything that was decided on the host stays as it was: grids, numbers among a kernel's arguments,
and which tensors, of which only the contents may have changed. What a graph cannot hold is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from toolkit.kernels.decode_attention import triton_form as decode
from toolkit.kernels.grouped_lora import triton_form as lora
from toolkit.kernels.merge_states import triton_form as merge

REFUSED = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "equal", "item", "masked_select", "unique")
"""Operations that bring numbers from the device to the host, or the other way."""


class Replay:
    """A run of a function that can be repeated; see `toolkit.serving.graphs.Capture`.

    Attributes:
        runs: how often it was.
    """

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self._events: list[Callable[[], None]] = []
        self.runs = 0
        run()
        with _recorded_launches(self._events), _Recording(self._events):
            self._output = run()

    def replay(self) -> torch.Tensor:
        """Do everything again."""
        self.runs += 1
        for event in self._events:
            event()
        return self._output


class _Recording(TorchDispatchMode):
    def __init__(self, events: list[Callable[[], None]]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in REFUSED or (name == "index_put" and any(_is_mask(t) for t in tree_leaves(args))):
            raise AssertionError(f"{name} cannot be captured")
        output = func(*args, **kwargs)
        made = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
        given = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}

        def again() -> None:
            found = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, torch.Tensor)]
            for old, new in zip(made, found, strict=True):
                if _place(old) not in given and old.numel():  # neither a view of what was given nor changed in place
                    old.copy_(new)

        self.events.append(again)
        return output


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


@contextmanager
def _recorded_launches(events: list[Callable[[], None]]) -> Iterator[None]:
    launches = {module: module.launch for module in (decode, lora, merge)}

    def recorded(launch: Any) -> Any:
        def note(*args: Any) -> None:
            with _disable_current_modes():
                launch(*args)
            events.append(lambda: launch(*args))

        return note

    for module, launch in launches.items():
        module.launch = recorded(launch)
    try:
        yield
    finally:
        for module, launch in launches.items():
            module.launch = launch
