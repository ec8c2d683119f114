"""Adapters: train deltas of a base, and put them together."""
