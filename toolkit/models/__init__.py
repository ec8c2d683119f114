"""transformers models: loading them, reading their hidden states, swapping parts of them and back."""
