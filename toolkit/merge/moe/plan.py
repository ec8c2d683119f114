"""Plan a mixture from headers alone: every tensor of the output and where its numbers come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit import specs
from toolkit.checkpoints.deltas import AdaptedCheckpoint
from toolkit.checkpoints.dtypes import DType, by_torch_name
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.writer import SHARD_BYTES, plan_shards
from toolkit.errors import Problem, ToolkitError, UnsupportedError
from toolkit.merge.moe.architectures import PROJECTIONS, Architecture, Sizes, choose
from toolkit.merge.moe.config import dense_config, mixture_config
from toolkit.merge.moe.gates import Prompts, encode_prompts
from toolkit.merge.moe.models import EMBEDDINGS, Models, check_models, mlp_name, open_models, touched
from toolkit.merge.moe.parts import Part, list_parts
from toolkit.merge.moe.spec import MoeSpec
from toolkit.tables import Table, human_bytes, human_count


@dataclass(frozen=True)
class Plan:
    """A checked mixture: nothing of it can fail but the reading and the writing.

    Attributes:
        spec: what was asked for.
        architecture: of the output.
        models: opened.
        parts: one per output tensor.
        shards: tensors of each output file.
        config: of the output.
        prompts: token ids of every gated expert's prompts; empty where routers are random.
        notes: what the user should know.
    """

    spec: MoeSpec
    architecture: Architecture
    models: Models
    parts: list[Part]
    shards: dict[str, list[TensorInfo]]
    config: dict[str, Any]
    prompts: list[Prompts]
    notes: list[str]

    @property
    def num_gates(self) -> int:
        """Vectors in each layer: one per expert, and one of a gated shared expert."""
        return len(self.spec.experts) + (len(self.spec.shared) if self.architecture.shared_gate else 0)

    @property
    def write_bytes(self) -> int:
        """Bytes of the output's weights."""
        return sum(part.tensor.nbytes for part in self.parts)

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(part.tensor.count for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """Elements of the tensors that one token meets."""
        asleep = len(self.spec.experts) - self.spec.experts_per_token
        one = [p for p in self.parts if ".experts.0." in p.tensor.name]
        return self.num_parameters - asleep * sum(part.tensor.count for part in one)

    def numbers(self) -> dict[str, Any]:
        """Return what JSON can hold of it."""
        return {
            "architecture": self.architecture.name,
            "experts": [c.source for path, c in self.models.experts.items() if path.startswith("experts")],
            "shared_experts": [c.source for path, c in self.models.experts.items() if path.startswith("shared")],
            "experts_per_token": self.spec.experts_per_token,
            "gate_mode": self.spec.gate_mode,
            "tensors": len(self.parts),
            "parameters": self.num_parameters,
            "active_parameters": self.active_parameters,
            "write_bytes": self.write_bytes,
            "notes": self.notes,
        }

    def table(self, title: str = "") -> Table:
        """Return it for a reader."""
        shared = f" and {len(self.spec.shared)} shared" if self.spec.shared else ""
        rows = [
            ["architecture", self.architecture.name],
            ["experts", f"{len(self.spec.experts)}{shared}, {self.spec.experts_per_token} per token"],
            ["routers", self.spec.gate_mode],
            ["parameters", f"{human_count(self.num_parameters)}, {human_count(self.active_parameters)} per token"],
            ["weights", human_bytes(self.write_bytes)],
            *(["note", note] for note in self.notes),
        ]
        return Table(("mixture of experts", title), rows)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def make_plan(
    spec: specs.Source | MoeSpec,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    allow_pickle: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Open the models' headers and plan every output tensor; see `build_moe` for the arguments.

    Raises:
        SpecError: all that is wrong with the spec and with how its models fit together.
    """
    loaded = specs.load(spec, MoeSpec, overrides=overrides, smoke=smoke)
    found = loaded.faults()
    dtype, wrong = _output_dtype(loaded)
    models, more = open_models(loaded, allow_pickle=allow_pickle)
    found += wrong + more
    if models is None:
        raise loaded.error(found)
    try:
        return _plan(loaded, models, dtype, found, shard_bytes)
    except BaseException:
        models.close()
        raise


def _plan(spec: MoeSpec, models: Models, dtype: DType | None, found: list[Problem], shard_bytes: int) -> Plan:
    chosen = choose(spec, models.base.config.get("model_type"))
    if not isinstance(chosen, Architecture):
        raise spec.error(found + chosen)
    dense: dict[str, Any] = {}
    try:
        dense = dense_config(models.base)
        if dense["num_hidden_layers"] != models.num_layers:
            counts = f"{dense['num_hidden_layers']} layers, its weights {models.num_layers}"
            found.append(Problem("base_model", f"its config says {counts}"))
    except ToolkitError as error:
        found.append(Problem("base_model", str(error)))
    found += check_models(chosen, models)
    prompts, wrong = encode_prompts(spec, models.base, gated_shared=chosen.shared_gate)
    found += wrong
    if found:
        raise spec.error(found)
    stored = dtype or models.base.info(EMBEDDINGS).dtype
    config, notes = mixture_config(chosen, dense, _sizes(spec, models), stored)
    parts = list(list_parts(spec, chosen, models, dtype))
    shards = plan_shards([part.tensor for part in parts], shard_bytes)
    notes += _notes(spec, chosen, models)
    return Plan(spec, chosen, models, parts, shards, config, prompts, notes)


def _output_dtype(spec: MoeSpec) -> tuple[DType | None, list[Problem]]:
    if spec.dtype is None:
        return None, []
    try:
        dtype = by_torch_name(spec.dtype)
    except UnsupportedError as error:
        return None, [Problem("dtype", str(error))]
    if not dtype.floating:
        return None, [Problem("dtype", f"{spec.dtype} cannot hold weights")]
    return dtype, []


def _sizes(spec: MoeSpec, models: Models) -> Sizes:
    width = models.experts["experts[0]"].info(mlp_name(0, PROJECTIONS[0])).shape[0]
    return Sizes(len(spec.experts), spec.experts_per_token, width, width if spec.shared else 0)


def _notes(spec: MoeSpec, architecture: Architecture, models: Models) -> Iterator[str]:
    if len({id(models.experts[path]) for path, _ in spec.slots()}) == 1 and len(spec.experts) > 1:
        yield "all experts are the same model: of use only if the mixture is trained"
    if architecture.model_type == "deepseek":
        yield "DeepSeek-MoE is loaded with its authors' code (trust_remote_code), which transformers 5 may not run"
        if spec.experts_per_token == 1:
            yield "DeepSeek-MoE multiplies a single expert by its probability, which is below 1"
    for path, expert in models.experts.items():
        if isinstance(expert, AdaptedCheckpoint):
            changed = touched(expert)
            lost = sum(".mlp." not in name for name in changed)
            if lost:
                what = f"{lost} of {len(changed)} tensors that its adapter changes are not of MLPs"
                yield f"{path}: {what}, and are left out"
