"""The serving spec."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from toolkit.adapters.spec import AdapterSpec, TrainingSpec
from toolkit.routing.token.spec import ServedTokenRouter
from toolkit.specs import Folder, Size, Spec


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Keys = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)]
"""One API key, or a list of them."""


class Limits(Spec):
    """Sizes of the batch and of the cache.

    Attributes:
        max_requests: most requests that run at once.
        max_batch_tokens: tokens of a step.
        max_model_len: tokens of prompt and answer, at most and by default what the model takes.
        default_max_tokens: tokens of an answer for which a request names no limit, or less where the model or the
            cache takes less.
        page_size: tokens of a page.
        cache_tokens: tokens that the cache holds; its pages hold the adapters in use too. By default the longest
            request `max_requests` times over, at most 65,536, and the adapters that are there from the start.
        prefix_cache: compute prompts that begin alike once.
        decode_graphs: capture steps of single tokens as CUDA graphs on a GPU.
        host_adapters: bytes of adapters that are kept on the host of a GPU for their next use; on a CPU none are, for
            the cache itself is there.
        swap_bytes: of the host for what requests had computed that must make room; by default it is computed anew.
        max_waiting: answers that may wait for their turn, beyond the `max_requests` that run; a server refuses more.
        max_body: bytes of a request's body.
        requests_per_minute: that one API key may send; by default any number.
    """

    max_requests: Annotated[int, Field(ge=1)] = 64
    max_batch_tokens: Annotated[int, Field(ge=1)] = 2048
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    default_max_tokens: Annotated[int, Field(ge=1)] = 1024
    page_size: Annotated[int, Field(ge=1)] = 16
    cache_tokens: Annotated[int, Field(ge=2)] | None = None
    prefix_cache: bool = True
    decode_graphs: bool = True
    host_adapters: Size = 4_000_000_000
    swap_bytes: Size | None = None
    max_waiting: Annotated[int, Field(ge=0)] = 1024
    max_body: Size = 16_000_000
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _budget(self) -> Limits:
        if self.max_batch_tokens < self.max_requests:
            raise ValueError("max_batch_tokens is below max_requests, so not every answer could go on in a step")
        return self

    def host_bytes(self, device: str) -> int:
        """Return the bytes of adapters that are kept on the host of a kind of device."""
        return 0 if device == "cpu" else self.host_adapters

    def num_pages(self, longest: int) -> int:
        """Return the pages of the cache for requests of at most `longest` tokens."""
        per_request = -(-longest // self.page_size)
        wanted = self.cache_tokens or max(longest, min(65536, longest * self.max_requests))
        return max(1, wanted // self.page_size) if self.cache_tokens else max(per_request, wanted // self.page_size)


_LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


class FineTuning(Spec):
    """Fine-tuning beside requests.

    Attributes:
        folder: of the files that clients send, the jobs, and the adapters that come of them.
        step_seconds: how long a step of the engine may last with a part of the training in it.
        adapter: what is trained: a LoRA.
        training: how, as far as a job does not say otherwise.
    """

    folder: Folder
    step_seconds: Annotated[float, Field(gt=0)] = 0.05
    adapter: AdapterSpec = AdapterSpec.model_validate({"method": "lora", **_LORA})
    training: TrainingSpec = TrainingSpec(num_epochs=3, lr_scheduler="cosine", warmup_steps=0.05)

    @model_validator(mode="after")
    def _adapter_alone(self) -> FineTuning:
        """Refuse what would change the weights that are served."""
        fields = self.adapter.fields
        if self.adapter.method != "lora":
            raise ValueError(f"adapter.method: a LoRA is trained beside requests, no {self.adapter.method}")
        if fields.get("bias", "none") != "none":
            raise ValueError("adapter.bias: the base's own biases are served; leave it out")
        if fields.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
            raise ValueError("adapter.init_lora_weights: it changes the base's weights, which are served; leave it out")
        return self


class RayServe(Spec):
    """Replicas on Ray Serve.

    Attributes:
        min_replicas: that always run.
        max_replicas: that run when there is enough to do.
        ongoing_requests: of each replica, beyond which Ray adds one; by default half of `limits.max_requests`.
        cpus: of a replica.
        gpus: of a replica; by default one where there are any.
        address: of a cluster, or `auto` for the one of this machine; by default one is started here.
    """

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 2
    ongoing_requests: Annotated[float, Field(gt=0)] | None = None
    cpus: Annotated[float, Field(gt=0)] = 1
    gpus: Annotated[float, Field(ge=0)] | None = None
    address: str | None = None

    @model_validator(mode="after")
    def _ordered(self) -> RayServe:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas is below min_replicas")
        return self

    @property
    def num_gpus(self) -> float:
        """GPUs of a replica."""
        if self.gpus is not None:
            return self.gpus
        import torch

        return 1.0 if torch.cuda.is_available() else 0.0


class ServeSpec(Spec):
    """A server.

    Attributes:
        model: the base: a folder, a hub id, or `toolkit:base`.
        adapters: folders of adapters, full fine-tunes or compressed deltas by the name under which they are served.
        router: folder of a fitted router, for the model `auto`.
        router_seconds: between two looks at that folder; a new router in it is taken up while requests go on. 0 never
            looks.
        token_routers: routers that mix adapters token by token, by the names of the models that they are.
        limits: sizes of the batch and of the cache.
        host: to listen on.
        port: to listen on; 0 takes a free one.
        api_key: one or several, one of which requests must carry; without any, whoever reaches the port is served.
        adapter_roots: folders that clients may load adapters from while the server runs; none allows no loading.
        adapter_folders: folders whose own folders are adapters; all are served under their names, those that come later
            too, and what goes from there is forgotten.
        adapter_seconds: between two looks at these.
        fine_tuning: where LoRAs are trained beside requests, and how; by default none are.
        ray: replicas on Ray Serve behind one address, instead of one server.
        drain_seconds: how long requests under way may take to finish when the server is told to stop.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: of the weights.
        trust_remote_code: run code that comes with the model.
    """

    model: Any
    adapters: dict[str, Folder] = Field(default_factory=dict)
    router: Folder | None = None
    router_seconds: Annotated[float, Field(ge=0)] = 2.0
    token_routers: dict[str, ServedTokenRouter] = Field(default_factory=dict)
    limits: Limits = Limits()
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key: Keys = Field(default_factory=list)
    adapter_roots: list[Folder] = Field(default_factory=list)
    adapter_folders: list[Folder] = Field(default_factory=list)
    adapter_seconds: Annotated[float, Field(gt=0)] = 2.0
    fine_tuning: FineTuning | None = None
    ray: RayServe | None = None
    drain_seconds: Annotated[int, Field(ge=0)] = 30
    device: str = "auto"
    dtype: str | None = None
    trust_remote_code: bool = False
