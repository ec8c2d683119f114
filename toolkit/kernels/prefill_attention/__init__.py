"""Causal attention of several query tokens per sequence, over paged keys and values or over packed ones."""

from toolkit.kernels.prefill_attention.api import packed_attention, prefill_attention

__all__ = ["packed_attention", "prefill_attention"]
