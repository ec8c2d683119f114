"""Alignment: permute one model's units so that they sit where another model has the same ones."""
