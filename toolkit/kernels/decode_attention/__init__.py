"""Attention of one query token per sequence over paged keys and values."""

from toolkit.kernels.decode_attention.api import SharedPrefix, decode_attention, quantized_decode_attention

__all__ = ["SharedPrefix", "decode_attention", "quantized_decode_attention"]
