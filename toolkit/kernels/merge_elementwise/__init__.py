"""Merging of weights element by element, in one pass over memory."""

from toolkit.kernels.merge_elementwise.api import KeptAtRandom, KeptLargest, Vote, merge_elementwise

__all__ = ["KeptAtRandom", "KeptLargest", "Vote", "merge_elementwise"]
