"""Served names that stand for a token router over adapters, and the routers that running requests are answered with.

A router belongs to the contents of its adapters. When one of them is loaded anew, the next request gets a router for
the new contents; those under way go on with theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from toolkit.errors import RequestError, ToolkitError, UnsupportedError
from toolkit.kernels.grouped_lora import Routes
from toolkit.routing.token.experts import ONLY, Expert
from toolkit.routing.token.router import TokenRouter, load_token_router, make_token_router
from toolkit.routing.token.spec import TokenRouterSpec
from toolkit.serving.adapters.contents import Source
from toolkit.serving.mix import Mix


@dataclass
class RoutedRows:
    """Consecutive rows whose experts a router chooses.

    Attributes:
        start: first row.
        stop: row after the last.
        router: whose they are, on the device.
        slots: of its experts, in its order.
    """

    start: int
    stop: int
    router: TokenRouter
    slots: tuple[int, ...]
    _routes: dict[int, Routes] = field(default_factory=dict, repr=False)

    def routes(self, sites: Sequence[str], x_TK: torch.Tensor) -> Routes:
        """Return the experts of these rows at linears that read `x`, each with weights of its own."""
        count = len(x_TK)
        if count not in self._routes:
            self._routes[count] = Routes.to_all(self.slots, count)
        return self._routes[count].mixed(self.router.mixture(sites, x_TK))


@dataclass
class _Served:
    """What a name stands for.

    Attributes:
        spec: as it was declared.
        router: of the contents that its adapters have now.
        identity: of the router with them.
    """

    spec: TokenRouterSpec
    router: TokenRouter
    identity: str


class TokenRouters:
    """Token routers by name.

    Args:
        sources: what the adapters' names mean now.
        device: where routers compute.
    """

    def __init__(self, sources: Callable[[str], Source], device: torch.device) -> None:
        self._sources, self._device = sources, device
        self._served: dict[str, _Served] = {}
        self._known: dict[str, TokenRouter] = {}
        self._users: Counter[str] = Counter()

    @property
    def routers(self) -> Mapping[str, TokenRouter]:
        """Routers by name."""
        return {name: served.router for name, served in self._served.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._served

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def add(self, name: str, spec: TokenRouterSpec) -> None:
        """Make a router of what its adapters are now, under a name that no adapter has.

        Raises:
            SpecError: an adapter that is not served, or a wrong parameter.
            UnsupportedError: an adapter that is more than a LoRA on linears.
            MissingError: no such folder, or an adapter without the gate that the router needs.
            CheckpointError: it was trained on other adapters.
        """
        router = self._made(spec)
        self._serve(name, _Served(spec, router, router.version))

    def users_of(self, adapter: str) -> list[str]:
        """Return the routers that mix an adapter."""
        return [name for name, served in self._served.items() if adapter in served.router.experts]

    def mix(self, name: str) -> Mix:
        """Return what a request for a router is answered by.

        Raises:
            RequestError: an adapter was loaded anew and can no longer be mixed.
        """
        served = self._served[name]
        if [self._sources(expert).key for expert in served.router.experts] != list(served.router.keys):
            try:
                router = self._made(served.spec)
            except ToolkitError as error:
                raise RequestError(f"token router {name!r}: {error}") from None
            self._serve(name, served := _Served(served.spec, router, router.version))
        return Mix.of([(key, 1.0) for key in served.router.keys]).routed(served.identity)

    def of(self, mix: Mix) -> TokenRouter:
        """Return the router of a mix."""
        return self._known[mix.router]

    def acquire(self, mix: Mix) -> None:
        """Keep a router until the request is done."""
        self._users[mix.router] += 1

    def abandon(self, mix: Mix) -> None:
        """Note that a request is done."""
        self._users[mix.router] -= 1
        self._drop_unused()

    def _serve(self, name: str, served: _Served) -> None:
        self._served[name] = served
        self._known[served.identity] = served.router.to(self._device)
        self._drop_unused()

    def _drop_unused(self) -> None:
        current = {served.identity for served in self._served.values()}
        for identity in [i for i in self._known if i not in current and self._users[i] <= 0]:
            del self._known[identity], self._users[identity]

    def _made(self, spec: TokenRouterSpec) -> TokenRouter:
        if spec.folder is not None:
            router = load_token_router(spec.folder).with_params(spec.parameters)
            experts = self._experts(router.experts)
            return router.bound([expert.key for expert in experts.values()])
        assert spec.router is not None, "the spec has one of both"
        return make_token_router(spec.router, self._experts(spec.adapters), spec.parameters)

    def _experts(self, names: Sequence[str]) -> dict[str, Expert]:
        sources = {name: self._sources(name) for name in names}
        first = {source.key: name for name, source in reversed(sources.items())}
        if twice := [name for name, source in sources.items() if first[source.key] != name]:
            raise UnsupportedError(f"{twice[0]} is the same adapter as {first[sources[twice[0]].key]}; name it once")
        return {name: expert_of(source) for name, source in sources.items()}


def expert_of(source: Source) -> Expert:
    """Read an adapter as an expert.

    Raises:
        UnsupportedError: it does more than to add a product to linears.
    """
    contents = source.read()
    extras = [p for p in contents.pairs.values() if p.gain_N is not None or p.bias_N is not None]
    if contents.changes or contents.prefix or extras or not contents.pairs:
        raise UnsupportedError(f"{source.description}: {ONLY}")
    return Expert(source.key, source.folder, contents.pairs)
