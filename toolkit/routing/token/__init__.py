"""Routers inside the model: at every linear, each token's own mixture of LoRA experts."""
