"""Weights on disk: models, adapters, deltas; knows files and formats, and nothing of methods."""
