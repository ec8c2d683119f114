"""Operations on tensors, a folder each: `api.py` to call, `reference.py` as the specification, faster forms."""
