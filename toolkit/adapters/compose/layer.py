"""A module of a model on which several adapters sit as a tree says; and the configuration of a composition."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft.tuners.tuners_utils import _find_minimal_target_modules
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from toolkit.adapters.compose import folding, tree
from toolkit.adapters.compose.mix import Attention, Mixture, Once, Rows, Scales, Weighted, head, make_rule, with_head
from toolkit.adapters.compose.sources import Layers, layers_of, put, read_source
from toolkit.adapters.methods._base import AdapterConfig, AdapterLayer, LowRank, Site, WeightChange, linear_sizes
from toolkit.errors import UnsupportedError

_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass
class ComposedConfig(AdapterConfig):
    """Fields of all compositions.

    Attributes:
        sources: adapters that are put together, by names: folders, hub ids, or their configurations, which stand in
            the place of paths once their tensors have been read.
        target_modules: `sources`: the modules that they sit on.
    """

    target_modules: list[str] | str | None = "sources"
    sources: dict[str, Any] = field(default_factory=dict)

    _layers: ClassVar[dict[str, Layers]] = {}
    _shared: ClassVar[dict[tuple[Any, ...], nn.Module]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        # In the order of the file: PEFT writes keys sorted, and the numbers of a mixture follow the sources.
        self.sources = dict(sorted(self.sources.items()))
        for name in self.sources:
            if not _NAME.fullmatch(name) or name == "default":
                raise ValueError(f"sources: an adapter cannot be called {name!r}; take letters, digits, _ and -")
        if self.sources:
            named = {leaf.name for leaf in tree.leaves(self.tree())}
            if unknown := sorted(named - set(self.sources)):
                raise ValueError(f"compose names {', '.join(unknown)}, which sources do not have")

    def tree(self) -> tree.Node:
        """Return how the sources are put together."""
        raise NotImplementedError

    def resolve(self, model: nn.Module) -> None:
        """Make the layers of the sources.

        Raises:
            ValueError: no sources.
            UnsupportedError: a source that cannot be composed.
        """
        if not self.sources:
            raise ValueError("sources: name the adapters to put together, such as {sort: runs/sort, upper: runs/upper}")
        made: dict[str, Layers] = {}
        # A configuration that is used again reads the folders again; no field, as they belong to no file.
        folders = self.__dict__.setdefault("_folders", dict(self.sources))
        for leaf in tree.leaves(self.tree()):
            given, tensors = folders[leaf.name], None
            if not isinstance(given, Mapping):
                given, tensors = read_source(given)
            made[leaf.name] = layers_of(leaf.name, given, tensors, model)
            self.sources[leaf.name] = dict(given)
        self.__dict__["_layers"], self.__dict__["_shared"] = made, {}
        keys = {key for layers in made.values() for key in layers}
        plain = [re.sub(r"\.base_layer(?=\.|$)", "", name) for name, _ in model.named_modules()]
        others = [name for name in plain if name not in keys]
        self.target_modules = sorted(_find_minimal_target_modules(keys, others))


class ComposedLayer(AdapterLayer):
    """A module with compositions of adapters around it."""

    TAKES: ClassVar[Literal["linear", "any", "decoder"]] = "any"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for part in ("rules", "sources"):
            setattr(self, f"{self.method}_{part}", nn.ModuleDict())
        self.adapter_layer_names = (f"{self.method}_rules",)
        self.built: dict[str, Callable[..., Any]] = {}
        self.other_param_names = (f"{self.method}_sources", "configs", "built")
        self.once = Once(base_layer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)  # a sublayer with adapters on it and in it

    def add(self, adapter: str, config: ComposedConfig, site: Site) -> None:
        """Put a composition on this module."""
        key = re.sub(r"\.base_layer(?=\.)", "", site.key)
        layers = {name: found[key] for name, found in config._layers.items() if key in found}
        self.configs[adapter] = config
        self._part("sources")[adapter] = _Sources(layers)
        self._part("rules")[adapter] = nn.ModuleDict()
        root = config.tree()
        numbers = {id(node): number for number, node in enumerate(tree.fuses(root))}
        self.built[adapter] = _Builder(self, adapter, site, layers, numbers).build(root, self.once)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters)

    def _part(self, name: str) -> Any:
        return getattr(self, f"{self.method}_{name}")

    def rule(self, node: tree.Fuse, number: int, adapter: str, site: Site) -> nn.Module:
        """Return the trained rule of a node here: its own, or that of the first module that shares it."""
        size = _outputs(self.get_base_layer(), site)
        config: ComposedConfig = self.configs[adapter]
        shared = config._shared
        key = (number, None if "uniform" in node.by else (site.key.rpartition(".")[2], size))
        if node.by.endswith("++") and key in shared:
            return shared[key]
        rule = make_rule(node, size)
        self._part("rules")[adapter][f"fuse_{number}"] = rule
        if node.by.endswith("++"):
            shared[key] = rule
        return rule

    def run_base(self, adapters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module as the active compositions change it; the changes of several are added."""
        if len(adapters) < 2:
            return (self.built[adapters[0]] if adapters else self.base_layer)(*args, **kwargs)
        output = self.base_layer(*args, **kwargs)
        y = head(output)
        with self.once.remembered(args, kwargs, output):
            total = y + sum(head(self.built[name](*args, **kwargs)) - y for name in adapters)
        return with_head(output, total)

    def _changed(self, adapters: list[str], x: Tensor, y: Tensor) -> Tensor:
        return y  # they ran with the base

    def folds(self, adapter: str) -> bool:
        """Tell whether all that happens here is a fixed change of a linear's weight."""
        if not isinstance(self.get_base_layer(), nn.Linear | Conv1D):
            return False
        try:
            folding.changes(self.built[adapter], self.once)
        except UnsupportedError:
            return False
        return True

    def low_rank(self, adapter: str) -> LowRank:
        """Return all factors side by side.

        Raises:
            UnsupportedError: a source is no LoRA, or they are mixed by what they are given.
        """
        if not isinstance(self.get_base_layer(), nn.Linear | Conv1D):
            raise UnsupportedError(f"{self.method} adapters around whole sublayers cannot be written as LoRA")
        pairs = folding.pairs(self.built[adapter], self.once)
        return LowRank(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1), 1.0)

    def fold(self, adapter: str) -> WeightChange:
        """Return the weighted sum of the sources' changes."""
        return WeightChange(folding.changes(self.built[adapter], self.once))

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without adapters on it or in it; PEFT calls this."""
        if merge:
            self.merge(safe_merge, adapter_names)
        base = self.get_base_layer()
        inner = [(key, module) for key, module in base.named_modules() if isinstance(module, ComposedLayer)]
        for key, layer in inner:
            put(base, key, layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names))
        return base

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move rules and sources; dtypes stay what they are."""
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for part in ("rules", "sources"):
            if adapter_name in self._part(part):
                module: nn.Module = self._part(part)[adapter_name]
                if not any(value.is_meta for value in module.state_dict().values()):
                    module.to(device)


def _outputs(module: nn.Module, site: Site) -> int:
    if isinstance(module, nn.Linear | Conv1D):
        return linear_sizes(module)[1]
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    return site.config.get_text_config().hidden_size


class _Sources(nn.Module):
    """Layers of other adapters: moved and stored with the model, and not seen by what walks over its adapters.

    PEFT sets, merges and trains every adapter layer that it finds among a model's modules; these are fixed.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(f"of_{name}", layer)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module], None, None]:
        """Yield this alone."""
        yield prefix, self


class _Builder:
    """Builds a tree out of callables at one module."""

    def __init__(
        self, layer: ComposedLayer, adapter: str, site: Site, layers: Mapping[str, Any], numbers: Mapping[int, int]
    ) -> None:
        self.layer, self.adapter, self.site = layer, adapter, site
        self.layers, self.numbers = layers, numbers

    def build(self, node: tree.Node, below: Any) -> Any:
        """Return `below` as a tree changes it; `below` itself where no source of the tree sits here."""
        match node:
            case tree.Leaf(name):
                if name not in self.layers:
                    return below
                vars(self.layers[name])["base_layer"] = below  # no submodule: it belongs to the model
                return self.layers[name]
            case tree.Stack(nodes):
                for inner in nodes:
                    below = self.build(inner, below)
                return below
        if not any(leaf.name in self.layers for leaf in tree.leaves(node)):
            return below
        once = Once(below)
        branches = [self.build(inner, once) for inner in node.nodes]
        if any(_reruns(self.layers.get(leaf.name)) for leaf in tree.leaves(node)):
            raise UnsupportedError("adapters with prefixes run the attention in their own way; stack them")
        return Mixture(once, branches, self._rule(node))

    def _rule(self, node: Any) -> Any:
        match node:
            case tree.Average():
                return Weighted(node.weights)
            case tree.Parallel():
                return Rows()
        rule = self.layer.rule(node, self.numbers[id(node)], self.adapter, self.site)
        assert isinstance(rule, Scales | Attention)
        return rule


def _reruns(layer: Any) -> bool:
    """Tell whether an adapter has prefixes, for which its layer calls the module with other keys and values."""
    if not isinstance(layer, AdapterLayer) or "prefix_keys" not in layer.TRAINED:
        return False
    return any(layer.has(name, "prefix_keys") for name in layer.active_adapters)
