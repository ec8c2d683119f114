"""LoRA of many adapters in one batch."""

from toolkit.kernels.grouped_lora.api import (
    Pair,
    Segment,
    grouped_lora,
    paged_lora,
    paged_lora_backward,
    paged_lora_form,
)
from toolkit.kernels.grouped_lora.pages import PagedPairs
from toolkit.kernels.grouped_lora.routes import Routes

__all__ = [
    "PagedPairs",
    "Pair",
    "Routes",
    "Segment",
    "grouped_lora",
    "paged_lora",
    "paged_lora_backward",
    "paged_lora_form",
]
