"""Exact merge of attention over several parts of the keys."""

from toolkit.kernels.merge_states.api import merge_states

__all__ = ["merge_states"]
