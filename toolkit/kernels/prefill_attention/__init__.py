"""Causal attention of several query tokens per sequence over paged keys and values."""

from toolkit.kernels.prefill_attention.api import prefill_attention

__all__ = ["prefill_attention"]
