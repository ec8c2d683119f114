"""Train the gates of token routers over frozen LoRA experts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit import specs
from toolkit.adapters.dataset import train_set
from toolkit.adapters.spec import DataSpec, TrainSpec
from toolkit.checkpoints.writer import check_free
from toolkit.data.collate import Collator
from toolkit.data.pack import Packed
from toolkit.errors import Problem, SpecError, UnsupportedError
from toolkit.kernels.grouped_lora import Pair
from toolkit.models.load import LoadedModel, load_model, pick_device
from toolkit.progress import track
from toolkit.routing.token.dispatch import balance_loss, dispatch, mix
from toolkit.routing.token.experts import Expert, read_expert
from toolkit.routing.token.gates import check_gate_free, write_gate
from toolkit.routing.token.ops import products
from toolkit.routing.token.router import SiteVectors, TokenRouter, kind_module, parameters
from toolkit.routing.token.spec import GatesSpec
from toolkit.tables import Report, Table

START = 0.02
"""Deviation of a mixture's gates before they are trained."""

Changed = Callable[[Tensor, Tensor], Tensor]
"""Of a linear's input `[T, K]` and output `[T, N]`, what it gives with experts."""


def fit_gates(
    spec: specs.Source | GatesSpec,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Report:
    """Train gates as a spec says; the base and the experts stay as they are.

    Args:
        spec: a YAML file, a dict or a `GatesSpec`.
        out: folder of a mixture, instead of the spec's own.
        overrides: `key.path=value` changes to the spec.
        smoke: apply the spec's own `smoke:` block.
        overwrite: replace what is there.
        quiet: show no progress.

    Raises:
        SpecError: the spec is wrong.
        UnsupportedError: an expert that is no plain LoRA.
        OutputError: the folder, or a gate, exists.
    """
    loaded = specs.load(spec, GatesSpec, overrides=overrides, smoke=smoke)
    _check_params(loaded)
    experts = {name: read_expert(expert.adapter) for name, expert in loaded.experts.items()}
    folder = _check_outputs(loaded, experts, out, overwrite)
    device, trust = pick_device(loaded.device), loaded.trust_remote_code
    base = load_model(loaded.base, device=device, dtype=torch.float32, trust_remote_code=trust)
    rows = {name: _rows(loaded, base, expert.data) for name, expert in loaded.experts.items()}
    if folder is None:
        losses = {name: _fit_gate(loaded, base, name, expert, rows[name], quiet) for name, expert in experts.items()}
    else:
        router, found = _fit_mixture(loaded, base, experts, list(chain(*rows.values())), quiet)
        router.save(folder, overwrite=overwrite)
        losses = {", ".join(experts): found}
    return _report(losses, folder)


def _check_params(spec: GatesSpec) -> None:
    try:
        parameters(spec.router, spec.parameters)
    except SpecError as error:
        raise spec.error([Problem(f"parameters.{p.where}", p.message) for p in error.problems]) from None


def _check_outputs(spec: GatesSpec, experts: Mapping[str, Expert], out: Any, overwrite: bool) -> Path | None:
    """Refuse outputs that exist; return the folder of a mixture."""
    if spec.router == "phatgoose":
        for expert in experts.values():
            check_gate_free(expert, spec.router, overwrite=overwrite)
        return None
    folder = out or spec.out
    if folder is None:
        raise spec.error([Problem("out", "a mixture needs a folder to write")])
    check_free(Path(folder), overwrite=overwrite)
    return Path(folder)


def _rows(spec: GatesSpec, base: LoadedModel, data: Sequence[str]) -> list[Packed]:
    """Return rendered rows, answers alone with labels, as an adapter's training has them."""
    source = DataSpec(train=list(data), max_length=spec.max_length, too_long="truncate", empty="skip")
    return cast(list[Packed], train_set(TrainSpec(base=(base.model, base.tokenizer), data=source), base).rows)


def _fit_gate(
    spec: GatesSpec, base: LoadedModel, name: str, expert: Expert, rows: Sequence[Packed], quiet: bool
) -> list[float]:
    """Train the gate of one expert and write it beside the adapter; return the loss of every step."""
    pairs = _moved(expert, base)
    gates = {site: nn.Parameter(pair.a_rK.new_zeros(pair.a_rK.shape[1])) for site, pair in pairs.items()}
    changes = {site: _gated(pair, gates[site]) for site, pair in pairs.items()}
    with attached(base.model, changes):
        losses = _train(spec, base, rows, list(gates.values()), None, name, quiet)
    write_gate(expert, spec.router, gates, {"steps": spec.steps, "base": base.source})
    return losses


def _gated(pair: Pair, gate: Tensor) -> Changed:
    return lambda x, y: y + torch.sigmoid(x @ gate)[:, None] * _product(pair, x)


def _fit_mixture(
    spec: GatesSpec, base: LoadedModel, experts: Mapping[str, Expert], rows: Sequence[Packed], quiet: bool
) -> tuple[TokenRouter, list[float]]:
    """Train the gates of all experts together; return the router and the loss of every step."""
    moved = {name: _moved(expert, base) for name, expert in experts.items()}
    generator = torch.Generator().manual_seed(spec.seed)
    mixers: dict[str, _Mixer] = {}
    for site in dict.fromkeys(site for pairs in moved.values() for site in pairs):
        own = {number: pairs[site] for number, pairs in enumerate(moved.values()) if site in pairs}
        mixers[site] = _Mixer(spec, own, generator)
    with attached(base.model, mixers):
        trained = [mixer.gate for mixer in mixers.values()]
        losses = _train(spec, base, rows, trained, lambda: _balance(mixers.values()), "mixture", quiet)
    keys = tuple(expert.key for expert in experts.values())
    sites = {s: SiteVectors(torch.tensor(list(m.pairs)), m.gate.detach().cpu()) for s, m in mixers.items()}
    return TokenRouter(spec.router, tuple(experts), keys, parameters(spec.router, spec.parameters), sites), losses


class _Mixer:
    """A mixture at one linear, in training; `pairs` are of the experts that have factors there, by number."""

    def __init__(self, spec: GatesSpec, pairs: Mapping[int, Pair], generator: torch.Generator) -> None:
        self.dispatch, self.pairs = spec.dispatch, pairs
        self.kind, self.params = kind_module(spec.router), parameters(spec.router, spec.parameters)
        a_rK = next(iter(pairs.values())).a_rK
        start = torch.randn(len(pairs), a_rK.shape[1], generator=generator) * START
        self.gate = nn.Parameter(start.to(a_rK.device))
        self.balance = self.gate.new_zeros(())

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Changed`."""
        index, weight = self.kind.route(x, self.gate, self.params)
        logits, spec = products(x, self.gate), self.dispatch
        surest = torch.softmax(logits, dim=1).amax(1) if spec.by_priority else None
        plan = dispatch(index, len(self.pairs), spec.capacity_factor, surest)
        self.balance = spec.balance * balance_loss(logits, index)
        return y + mix(x, weight, plan, [lambda rows, pair=pair: _product(pair, rows) for pair in self.pairs.values()])


def _balance(mixers: Iterable[_Mixer]) -> Tensor:
    return torch.stack([mixer.balance for mixer in mixers]).mean()


def _moved(expert: Expert, base: LoadedModel) -> dict[str, Pair]:
    """Return an expert's factors on the device of the base.

    Raises:
        UnsupportedError: it adapts what the base does not have.
    """
    known, found = dict(base.model.named_modules()), {}
    for site, pair in expert.pairs.items():
        if site not in known:
            raise UnsupportedError(f"{expert.folder}: adapts {site}, which {base.source} does not have")
        device = base.model.device
        found[site] = Pair(pair.a_rK.to(device), pair.b_Nr.to(device), scale=pair.scale)
    return found


def _product(pair: Pair, x: Tensor) -> Tensor:
    return functional.linear(functional.linear(x, pair.a_rK), pair.b_Nr) * pair.scale


@contextmanager
def attached(model: nn.Module, changes: Mapping[str, Changed]) -> Iterator[None]:
    """Change what linears give inside the block."""
    handles = []
    for site, change in changes.items():

        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor, change: Changed = change) -> Tensor:
            return change(args[0].flatten(0, -2), y.flatten(0, -2)).view_as(y)

        handles.append(model.get_submodule(site).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _train(
    spec: GatesSpec,
    base: LoadedModel,
    rows: Sequence[Packed],
    gates: Sequence[nn.Parameter],
    penalty: Callable[[], Tensor] | None,
    label: str,
    quiet: bool,
) -> list[float]:
    """Train gates by the base's own loss; the base gets no gradients."""
    collate = Collator(cast(int, base.tokenizer.pad_token_id or 0))
    optimizer, rng = torch.optim.AdamW(gates, lr=spec.learning_rate, weight_decay=0.0), random.Random(spec.seed)
    losses = []
    with frozen(base.model), track(label, spec.steps, unit="steps", quiet=quiet) as progress:
        for _ in range(spec.steps):
            batch = collate(rng.choices(rows, k=spec.batch_size))
            loss = base.model(**{key: value.to(base.model.device) for key, value in batch.items()}).loss
            (loss + penalty() if penalty else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            progress.advance(1)
    return losses


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Train no parameter of a model inside the block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _report(losses: Mapping[str, Sequence[float]], folder: Path | None) -> Report:
    few = {name: (found[: len(found) // 10 + 1], found[-(len(found) // 10 + 1) :]) for name, found in losses.items()}
    ends = {name: [sum(part) / len(part) for part in parts] for name, parts in few.items()}
    table = Table(("expert", "loss at first", "at last"), [[n, f"{a:.3f}", f"{b:.3f}"] for n, (a, b) in ends.items()])
    return Report({"losses": ends, "out": folder and str(folder)}, [table])
