"""Attention of LM-Infinite: a window and the first tokens, no further away than a ceiling."""

from toolkit.kernels.lambda_attention.api import lambda_attention

__all__ = ["lambda_attention"]
