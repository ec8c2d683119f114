"""The `config.json` of a mixture, from that of its dense base."""

from __future__ import annotations

from typing import Any

from toolkit.checkpoints.dtypes import DType
from toolkit.checkpoints.reader import Checkpoint
from toolkit.merge.moe.architectures import Architecture, Sizes
from toolkit.models.load import explained, quiet_transformers

_NOT_KEPT = ("architectures", "transformers_version", "dtype", "torch_dtype", "auto_map", "_name_or_path")


def dense_config(base: Checkpoint) -> dict[str, Any]:
    """Return the base's config with every default written out.

    Dense and mixture classes differ in their defaults (Llama's RMSNorm has an epsilon of 1e-6, Mixtral's of 1e-5), so
    what the base's config leaves out must not be left out of the mixture's.

    Raises:
        ToolkitError: transformers cannot read the config.
    """
    from transformers import AutoConfig, PretrainedConfig

    with explained(base.source), quiet_transformers():
        full: dict[str, Any] = AutoConfig.for_model(**base.config).to_dict()
        of_all = PretrainedConfig().to_dict()
    needless = {key for key, value in of_all.items() if key not in base.config and full.get(key) == value}
    kept = {key: value for key, value in full.items() if key not in needless and key not in _NOT_KEPT}
    return kept | _rope_for_all(full)


def _rope_for_all(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters as versions before 5 of transformers, and other engines, read them."""
    rope = dict(config.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None)
    scaling = {} if rope.get("rope_type", "default") == "default" else {"rope_scaling": rope}
    return ({"rope_theta": theta} if theta is not None else {}) | scaling


def mixture_config(
    architecture: Architecture, dense: dict[str, Any], sizes: Sizes, dtype: DType
) -> tuple[dict[str, Any], list[str]]:
    """Return the config of a mixture.

    Args:
        architecture: of the mixture.
        dense: the base's, from `dense_config`.
        sizes: of the experts.
        dtype: of the weights.

    Returns:
        The config, and what the architecture cannot do as the base does.
    """
    window, notes = _window(architecture, dense)
    head = {"architectures": [architecture.model_class], "model_type": architecture.model_type}
    # Older versions know no other name for the dtype, and newer ones still read it.
    return {**dense, **head, **window, **architecture.settings(sizes), "torch_dtype": dtype.torch}, notes


def _window(architecture: Architecture, dense: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return how the attention's sliding window is set."""
    layers, window = dense["num_hidden_layers"], dense.get("sliding_window")
    kinds = dense.get("layer_types") or ["sliding_attention" if window else "full_attention"] * layers
    slides = bool(window) and "sliding_attention" in kinds
    if slides and architecture.slides == "each":
        first = kinds.index("sliding_attention")
        return {"use_sliding_window": True, "layer_types": kinds, "max_window_layers": first}, []
    if slides and architecture.slides == "all" and "full_attention" not in kinds:
        return {"sliding_window": window, "use_sliding_window": True}, []
    off: dict[str, Any] = {"sliding_window": None, "use_sliding_window": False}
    off |= {"layer_types": ["full_attention"] * layers} if architecture.slides == "each" else {}
    note = f"{architecture.name} has no window of {window} tokens as the base has; all layers attend to everything"
    return off, [note] if slides else []
