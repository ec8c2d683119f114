"""Attention of one query token per sequence over paged keys and values."""

from toolkit.kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
