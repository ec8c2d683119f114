"""What every way of merging is worth on eight real text classification tasks of one small encoder."""
