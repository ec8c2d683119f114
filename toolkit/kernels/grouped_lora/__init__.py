"""LoRA of many adapters in one batch."""

from toolkit.kernels.grouped_lora.api import Pair, Segment, grouped_lora

__all__ = ["Pair", "Segment", "grouped_lora"]
