"""Rows of text to tokens: read, render, mask, pack."""
