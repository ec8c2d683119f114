"""A layer around a module, on which several adapters of one method sit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from toolkit.adapters.methods._sites import Site
from toolkit.errors import UnsupportedError


class LowRank(NamedTuple):
    """A change of a linear's weight: `scale * b @ a`.

    Attributes:
        a: `[r, in]`.
        b: `[out, r]`.
        scale: of the product.
    """

    a: Tensor
    b: Tensor
    scale: float


class WeightChange(NamedTuple):
    """What a linear's parameters change by.

    Attributes:
        weight: `[out, in]`.
        bias: `[out]`, or `None`.
    """

    weight: Tensor
    bias: Tensor | None = None


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A module with adapters around it, each under its own name; active ones add their changes to its output.

    Args:
        base_layer: what is adapted: a linear, or where `TAKES` says so any module from one tensor to one tensor.
    """

    TAKES: ClassVar[Literal["linear", "any", "decoder"]] = "linear"
    TRAINED: ClassVar[tuple[str, ...]] = ()
    """Tensors that are trained; in a checkpoint `{method}_{name}`."""
    STORED: ClassVar[tuple[str, ...]] = ()
    """Tensors that are not trained but belong to the checkpoint."""
    method: ClassVar[str]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.TRAINED:
            setattr(self, f"{self.method}_{name}", nn.ParameterDict())
        for name in self.STORED:
            setattr(self, f"{self.method}_{name}", BufferDict(persistent=True))
        self.configs: dict[str, Any] = {}
        self.adapter_layer_names = tuple(f"{self.method}_{name}" for name in self.TRAINED)
        self.other_param_names = (*(f"{self.method}_{name}" for name in self.STORED), "configs")
        self.merged_adapters = []
        self._before_merge: dict[str, Tensor] = {}

    # What a method says.

    def start(self, config: Any, site: Site) -> Mapping[str, Tensor]:
        """Make the tensors of a new adapter, float32, under names of `TRAINED` and `STORED`.

        Args:
            config: of the method.
            site: of this layer in the model.

        Raises:
            ValueError: the configuration does not fit this module.
        """
        raise NotImplementedError

    def change(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return what an adapter adds to the output of the module.

        Args:
            adapter: its name.
            x: `[..., in]`, input of the module, in the dtype of the adapter.
            y: `[..., out]`, output of the module without adapters, likewise.
        """
        raise NotImplementedError

    def low_rank(self, adapter: str) -> LowRank:
        """Return an adapter as one pair of factors.

        Raises:
            UnsupportedError: it is none.
        """
        raise UnsupportedError(f"{self.method} adapters cannot be written as LoRA")

    def fold(self, adapter: str) -> WeightChange:
        """Return what an adapter changes the weight and the bias of a linear by; by default its low-rank pair.

        Raises:
            UnsupportedError: it is no change of weights.
        """
        a, b, scale = self.low_rank(adapter)
        return WeightChange(scale * (b @ a))

    def folds(self, adapter: str) -> bool:
        """Tell whether an adapter is a change of weights, so that `fold` returns it."""
        return True

    def leave(self) -> None:
        """Take back what a method did to modules inside of its own; called when the layer is taken off."""

    # What a method uses.

    def tensor(self, adapter: str, name: str) -> Tensor:
        """Return a tensor of an adapter, by its name in `TRAINED` or `STORED`."""
        return getattr(self, f"{self.method}_{name}")[adapter]

    def has(self, adapter: str, name: str) -> bool:
        """Tell whether an adapter has a tensor of that name."""
        return adapter in getattr(self, f"{self.method}_{name}")

    def put(self, adapter: str, name: str, value: Tensor) -> None:
        """Set a tensor of an adapter; one in `TRAINED` becomes a parameter."""
        kept = nn.Parameter(value) if name in self.TRAINED else value
        getattr(self, f"{self.method}_{name}")[adapter] = kept

    @property
    def sizes(self) -> tuple[int, int]:
        """`(in, out)` of the linear."""
        return linear_sizes(self.get_base_layer())

    @property
    def base_weight(self) -> Tensor:
        """`[out, in]`, float32: the weight of the linear without adapters."""
        weight = self._before_merge.get("weight", self._linear.weight.data).float()
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    @property
    def base_bias(self) -> Tensor | None:
        """`[out]`, float32: the bias of the linear without adapters."""
        bias = self._linear.bias
        return None if bias is None else self._before_merge.get("bias", bias.data).float()

    @property
    def _linear(self) -> nn.Linear:
        return self.get_base_layer()  # pyright: ignore[reportReturnType]  # or one with the same parameters

    # What PEFT calls.

    def add(self, adapter: str, config: Any, site: Site) -> None:
        """Make a new adapter on this layer."""
        for name, value in self.start(config, site).items():
            self.put(adapter, name, value)
        self.configs[adapter] = config
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, and add the changes of its active adapters to its output, or to the first of several."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else [n for n in self.active_adapters if n in self.configs]
        x = args[0] if args else kwargs["hidden_states"]
        output = self.run_base(names, args, kwargs)
        if not names:
            return output
        y = output[0] if isinstance(output, tuple) else output
        total = self._changed(names, x, y)
        return (total, *output[1:]) if isinstance(output, tuple) else total

    def run_base(self, adapters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module itself; a method that changes more than its output does so here."""
        return self.base_layer(*args, **kwargs)

    def _changed(self, adapters: list[str], x: Tensor, y: Tensor) -> Tensor:
        total = y
        for adapter in adapters:
            dtype = self._dtype(adapter, y.dtype)
            total = total + self.change(adapter, self._cast_input_dtype(x, dtype), self._cast_input_dtype(y, dtype))
        return total.to(y.dtype)

    def _dtype(self, adapter: str, default: torch.dtype) -> torch.dtype:
        trained = [self.tensor(adapter, name) for name in self.TRAINED if self.has(adapter, name)]
        return trained[0].dtype if trained else default

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the weights.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: which; the active ones by default.

        Raises:
            UnsupportedError: they are no change of these weights.
            ValueError: the result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.configs]
        if not names:
            return
        merged = [*self.merged_adapters, *names]
        weight, bias = self._folded(merged)
        if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ValueError(f"adapter {' + '.join(names)}: the merged weights are not finite")
        linear = self._linear
        self._write(linear, "weight", weight.T if isinstance(self.get_base_layer(), Conv1D) else weight)
        if bias is not None:
            self._write(linear, "bias", bias)
        self.merged_adapters = merged

    def _folded(self, adapters: list[str]) -> tuple[Tensor, Tensor | None]:
        if not self._linear.weight.is_floating_point():
            raise UnsupportedError(f"{self.method} cannot be merged into quantised weights; load the base in bfloat16")
        weight, bias = self.base_weight, self.base_bias
        with torch.no_grad():
            for change in [self.fold(name) for name in adapters]:
                weight = weight + change.weight.float()
                if change.bias is not None and bias is None:
                    raise UnsupportedError(f"{self.method} cannot be merged: it adds a bias, and the base has none")
                bias = bias if change.bias is None or bias is None else bias + change.bias.float()
        return weight, bias

    def _write(self, linear: nn.Module, name: str, value: Tensor) -> None:
        parameter = getattr(linear, name)
        # Kept as it was: subtracting would not give the same bits, and a change may depend on the weight itself.
        self._before_merge.setdefault(name, parameter.data)
        parameter.data = value.to(parameter.dtype).contiguous()

    def unmerge(self) -> None:
        """Put the weights back as they were."""
        for name, value in self._before_merge.items():
            getattr(self._linear, name).data = value
        self._before_merge, self.merged_adapters = {}, []

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what an adapter changes the stored weight by, as PEFT's methods do."""
        weight = self.fold(adapter).weight
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT's own conversion whether it can use `get_delta_weight`."""
        return all(self.folds(name) for name in self.configs)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None and (first := next(base_layer.parameters(), None)) is not None:
            return first.device, first.dtype
        return device, dtype


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Return `(in, out)` of a linear or of GPT-2's Conv1D."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    assert isinstance(module, nn.Linear), type(module)
    return module.in_features, module.out_features


def uniform(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Draw as `nn.Linear` and LoRA's A do: uniformly within `1 / sqrt(fan_in)`."""
    return torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5)
