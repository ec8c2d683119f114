"""Mixtures of experts out of dense models: their MLPs side by side, behind a router made from hidden states.

Attention, norms and embeddings are those of one base; each expert gives its MLPs. What the output is called on disk
and in its config is a row of `architectures`; what its routers hold is computed in `gates`.
"""
