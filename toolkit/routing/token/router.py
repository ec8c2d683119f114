"""What a token router is, and its folder.

A kind of token router is one module in `toolkit/routing/token/routers` that declares

- `class Params(Spec)`: its parameters;
- `route(x [T, K], vectors [E, *], params) -> (index [T, k], weight [T, k])`: of the inputs of a linear, float32, the
  experts of every row, and the weights of their changes;
- optionally `vector(pair) -> [*]`: what stands for an expert at a linear, made of its factors;
- optionally `BESIDE = True`: that vector was trained and lies in the adapter's folder (`token.gates`).

The vectors of other kinds are saved with the router, as safetensors beside `token_router.json`. Of a linear only those
experts are candidates that have factors there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from toolkit import names, specs
from toolkit.checkpoints.adapters import CONFIG as ADAPTER_CONFIG
from toolkit.checkpoints.adapters import WEIGHTS
from toolkit.checkpoints.companions import versions
from toolkit.checkpoints.locate import locate
from toolkit.checkpoints.reader import open_checkpoint, read_json
from toolkit.checkpoints.writer import staged, write_text
from toolkit.errors import CheckpointError, MissingError, SpecError
from toolkit.routing.token.arrays import read_arrays, write_arrays
from toolkit.routing.token.experts import Expert
from toolkit.routing.token.gates import read_gate
from toolkit.routing.token.ops import Choice
from toolkit.routing.token.routers import scalearn
from toolkit.specs import Spec

ROUTERS = "toolkit.routing.token.routers"
CONFIG, STEM = "token_router.json", "token_router"
FORMAT = 1


@dataclass(frozen=True)
class SiteVectors:
    """What a router knows at one linear.

    Attributes:
        experts: `[E]` int64, which of the router's experts have factors there.
        vectors: `[E, *]` float32, one of each.
    """

    experts: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class TokenRouter:
    """Chooses experts for every token at every linear.

    Attributes:
        kind: name of its module.
        experts: names.
        keys: hashes of their contents, in that order; empty where the router was made of none in particular.
        params: of its kind.
        sites: by the names of the linears.
    """

    kind: str
    experts: tuple[str, ...]
    keys: tuple[str, ...]
    params: Spec
    sites: Mapping[str, SiteVectors]

    def route(self, site: str, x_TK: Tensor) -> Choice:
        """Return the experts of every row at a linear, `[T, k]` int64, and their weights, `[T, k]` float32.

        Args:
            site: name of a linear that is among the router's.
            x_TK: its input.
        """
        own = self.sites[site]
        index, weight = kind_module(self.kind).route(x_TK.float(), own.vectors, self.params)
        return own.experts[index], weight

    def mixture(self, sites: Sequence[str], x_TK: Tensor) -> Tensor:
        """Return the weight of every expert at linears that read the same input, `[P, T, E]` float32; 0 is none."""
        found = x_TK.new_zeros(len(sites), len(x_TK), len(self.experts), dtype=torch.float32)
        for linear, site in enumerate(sites):
            if site in self.sites:
                found[linear].scatter_(1, *self.route(site, x_TK))
        return found

    def to(self, device: torch.device) -> TokenRouter:
        """Return it on a device."""
        sites = {n: SiteVectors(s.experts.to(device), s.vectors.to(device)) for n, s in self.sites.items()}
        return replace(self, sites=sites)

    def bound(self, keys: Sequence[str]) -> TokenRouter:
        """Return it for experts of these contents.

        Raises:
            CheckpointError: it was trained on others.
        """
        changed = [n for n, own, key in zip(self.experts, self.keys, keys, strict=False) if own != key]
        if changed:
            raise CheckpointError(f"{changed[0]} is another adapter than the one that the router was trained on")
        return replace(self, keys=tuple(keys))

    def with_params(self, given: Mapping[str, Any]) -> TokenRouter:
        """Return it with other values of some parameters.

        Raises:
            SpecError: a parameter that the kind does not have, or not with this value.
        """
        return replace(self, params=parameters(self.kind, {**self.params.model_dump(), **given}))

    @property
    def version(self) -> str:
        """Identity of what the router does with its experts: 32 hex digits."""
        about = [self.kind, self.keys or self.experts, self.params.model_dump(mode="json"), sorted(self.sites)]
        digest = hashlib.blake2b(json.dumps(about).encode(), digest_size=16)
        for _, site in sorted(self.sites.items()):
            digest.update(site.experts.cpu().numpy().tobytes() + site.vectors.cpu().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """Say in a few words what it is."""
        return f"{self.kind}, each token's own of {', '.join(self.experts)} at {len(self.sites)} linears"

    def save(self, out: str | Path, *, overwrite: bool = False) -> None:
        """Write the router as a folder.

        Raises:
            OutputError: `out` exists.
        """
        arrays = {f"{name}.experts": s.experts.float() for name, s in self.sites.items()}
        arrays |= {f"{name}.vectors": s.vectors for name, s in self.sites.items()}
        config = {
            "format": FORMAT,
            "router": self.kind,
            "experts": dict(zip(self.experts, self.keys or [""] * len(self.experts), strict=True)),
            "parameters": self.params.model_dump(mode="json"),
            "made_with": versions("torch"),
        }
        with staged(Path(out), overwrite=overwrite) as partial:
            write_arrays(partial, STEM, arrays)
            write_text(partial / CONFIG, json.dumps(config, indent=2) + "\n")


def kind_module(kind: str) -> ModuleType:
    """Import the module of a kind of token router.

    Raises:
        UnsupportedError: no such kind.
    """
    return names.load(ROUTERS, kind, "token router")


def parameters(kind: str, given: Mapping[str, Any]) -> Spec:
    """Return the checked parameters of a kind.

    Raises:
        SpecError: a parameter that the kind does not have, or not with this value.
    """
    return specs.validate(dict(given), kind_module(kind).Params)


def make_token_router(kind: str, experts: Mapping[str, Expert], given: Mapping[str, Any]) -> TokenRouter:
    """Make a router of experts, from their factors or from what lies beside them.

    Args:
        kind: such as `arrow`.
        experts: by name.
        given: parameters of the kind.

    Raises:
        UnsupportedError: no such kind, or one that is trained for its experts together and loaded from a folder.
        SpecError: a wrong parameter.
        MissingError: an adapter without the gate that the kind needs.
    """
    module = kind_module(kind)
    if hasattr(module, "vector"):
        found = {n: {site: module.vector(pair) for site, pair in e.pairs.items()} for n, e in experts.items()}
    elif getattr(module, "BESIDE", False):
        found = {n: read_gate(expert, kind) for n, expert in experts.items()}
    else:
        raise SpecError(f"a {kind} router is trained for its experts together; name its folder")
    keys = [expert.key for expert in experts.values()]
    return TokenRouter(kind, tuple(experts), tuple(keys), parameters(kind, given), gathered(found))


def gathered(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, SiteVectors]:
    """Turn vectors by expert and linear into what a router knows at each linear."""
    sites: dict[str, list[tuple[int, Tensor]]] = {}
    for number, vectors in enumerate(found.values()):
        for site, vector in vectors.items():
            sites.setdefault(site, []).append((number, vector))
    return {
        site: SiteVectors(torch.tensor([n for n, _ in own]), torch.stack([v for _, v in own]))
        for site, own in sites.items()
    }


def load_token_router(source: str | Path) -> TokenRouter:
    """Load a saved router, or the uniform scales of a ScaLearn adapter.

    Raises:
        MissingError: nothing there, or no token router.
        CheckpointError: broken files.
        UnsupportedError: a ScaLearn adapter whose scales are vectors.
    """
    folder = locate(source)
    if (folder / CONFIG).is_file():
        return _load(folder)
    config = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else {}
    if config.get("peft_type") != "SCALEARN":
        raise MissingError(f"{source}: neither {CONFIG} nor a ScaLearn adapter in this folder")
    experts = list(config["sources"])
    with open_checkpoint(folder / WEIGHTS) as weights:
        tensors = {name: weights.tensor(name) for name in weights.tensors}
    by_site = scalearn.read(experts, tensors, str(source))
    found = {e: {site: own[e] for site, own in by_site.items() if e in own} for e in experts}
    return TokenRouter("scalearn", tuple(experts), (), scalearn.Params(), gathered(found))


def _load(folder: Path) -> TokenRouter:
    config = read_json(folder / CONFIG)
    kind, experts = config.get("router"), config.get("experts")
    if config.get("format") != FORMAT or kind not in names.available(ROUTERS) or not isinstance(experts, dict):
        raise CheckpointError(f"{folder / CONFIG}: no token router that this toolkit reads")
    try:
        params = parameters(kind, config.get("parameters") or {})
    except SpecError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    arrays = read_arrays(folder, STEM)
    sites = {
        name.removesuffix(".vectors"): SiteVectors(_experts(arrays, name, len(experts), folder), value)
        for name, value in arrays.items()
        if name.endswith(".vectors")
    }
    return TokenRouter(kind, tuple(experts), tuple(filter(None, experts.values())), params, sites)


def _experts(arrays: Mapping[str, Tensor], name: str, count: int, folder: Path) -> Tensor:
    """Return which experts the vectors of a linear are of."""
    numbers = arrays.get(f"{name.removesuffix('.vectors')}.experts")
    vectors = arrays[name]
    whole = numbers is not None and vectors.dim() == 2 and len(numbers) == len(vectors) and vectors.isfinite().all()
    if numbers is None or not whole or not ((numbers >= 0) & (numbers < count)).all():
        raise CheckpointError(f"{folder}: {name} does not fit the router's {count} experts")
    return numbers.long()
