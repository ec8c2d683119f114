"""A linear whose weight an adapter takes the place of, instead of adding to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from toolkit.adapters.methods._layer import AdapterLayer, WeightChange


class ReplacedLinear(AdapterLayer):
    """A linear that computes with its adapter's own weight, and with its bias.

    Of several adapters every one counts by how its weight differs from the base's, as with adapters that add to it.
    """

    def replaces(self, adapter: str) -> bool:
        """Tell whether an adapter has a weight of its own here."""
        raise NotImplementedError

    def product(self, adapter: str, x: Tensor) -> Tensor:
        """Return the adapter's weight times `x`, `[..., out]`."""
        raise NotImplementedError

    def whole(self, adapter: str) -> Tensor:
        """Return the adapter's weight, `[out, in]`."""
        raise NotImplementedError

    def run_base(self, adapters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the linear; where one adapter replaces it only its bias, without a product."""
        count, bias = sum(map(self.replaces, adapters)), self._linear.bias
        if count == 0:
            return super().run_base(adapters, args, kwargs)
        if count == 1:
            (x,) = args
            out = x.new_zeros(*x.shape[:-1], self.sizes[1], dtype=self._linear.weight.dtype)
            return out if bias is None else out + bias
        out = super().run_base(adapters, args, kwargs)
        return (1 - count) * out if bias is None else (1 - count) * out + count * bias

    def change(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return the adapter's product, which `run_base` leaves room for."""
        return self.product(adapter, x) if self.replaces(adapter) else y.new_zeros(())

    def fold(self, adapter: str) -> WeightChange:
        """Return the adapter's weight less the base's."""
        base = self.base_weight
        return WeightChange(self.whole(adapter).float() - base if self.replaces(adapter) else base.new_zeros(()))
