"""Linear layers of full fine-tunes of one base, each kept as a bit per weight."""

from toolkit.kernels.delta_linear.api import BitDeltas, delta_linear

__all__ = ["BitDeltas", "delta_linear"]
