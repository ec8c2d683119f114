"""The specs of a transfer, and of the discriminator that filters what is made up for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from toolkit.adapters.spec import AdapterSpec, Base, TrainingSpec
from toolkit.specs import Files, Folder, Spec


class SourceSide(Spec):
    """The adapter that is moved, on its own base; together they are the teacher.

    Attributes:
        base: model that the adapter was trained on.
        adapter: a folder or a hub id, of any type that PEFT knows.
    """

    base: Base
    adapter: Folder


class SyntheticSpec(Spec):
    """What is made up.

    Attributes:
        count: rows that are wanted.
        attempts: most candidates per wanted row.
        start: what the model continues: a `list` of seeds, with another entry, as the paper does; or, where it is too
            small to follow a list, the first words of one `seed`, as the message of a user.
        shots: seeds of a list.
        max_prompt_tokens: of a candidate.
        max_answer_tokens: of the teacher's answer.
        temperature: of candidates; answers are greedy.
        batch_size: candidates at a time.
        seed: of everything that is drawn.
    """

    count: Annotated[int, Field(ge=1)] = 500
    attempts: Annotated[int, Field(ge=1)] = 20
    start: Literal["list", "seed"] = "list"
    shots: Annotated[int, Field(ge=1)] = 5
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 64
    max_answer_tokens: Annotated[int, Field(ge=1)] = 128
    temperature: Annotated[float, Field(gt=0)] = 1.0
    batch_size: Annotated[int, Field(ge=1)] = 16
    seed: Annotated[int, Field(ge=0)] = 0


class DistillationSpec(Spec):
    """How the new adapter learns from the teacher.

    Attributes:
        loss: `logits`: the Kullback-Leibler divergence from the teacher's distribution, for one and the same tokenizer;
            `text`: the likelihood of the teacher's answers; `auto`: the former where it can be.
        max_steps: optimizer steps.
        batch_size: rows of a step.
        learning_rate: at the start; falls to zero linearly.
        max_grad_norm: gradients are scaled down to this norm.
        save_steps: steps between two checkpoints, from which `resume` goes on.
        seed: of the new adapter, the order of rows, and dropout.
    """

    loss: Literal["auto", "logits", "text"] = "auto"
    max_steps: Annotated[int, Field(ge=1)] = 500
    batch_size: Annotated[int, Field(ge=1)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    save_steps: Annotated[int, Field(ge=1)] = 50
    seed: Annotated[int, Field(ge=0)] = 0


class TransferSpec(Spec):
    """A transfer.

    Attributes:
        source: the adapter that is moved.
        target: base that it is moved to.
        seeds: file with a few rows such as the adapter was trained on; only what is asked in them is read.
        discriminator: folder of `train_discriminator`; without one every candidate is taken.
        threshold: log odds of a real row that a candidate must have.
        synthetic: what is made up.
        adapter: what is trained on the target.
        distillation: how.
        out: folder to write, a PEFT adapter of the target.
        device: `auto`, `cpu`, `cuda`, ...
        trust_remote_code: run code that comes with a model.
    """

    source: SourceSide
    target: Base
    seeds: Folder
    discriminator: Folder | None = None
    threshold: float = 0.0
    synthetic: SyntheticSpec = SyntheticSpec()
    adapter: AdapterSpec = AdapterSpec()
    distillation: DistillationSpec = DistillationSpec()
    out: Folder | None = None
    device: str = "auto"
    trust_remote_code: bool = False


class DiscriminatorSpec(Spec):
    """Training of a discriminator, on the side that has the original data.

    Attributes:
        base: of the source.
        real: files of the original task; what is asked in their rows is real.
        synthetic: how rows that are not are made up, with the base as the generator.
        adapter: what is trained.
        training: how.
        out: folder to write, a PEFT adapter of the base.
        device: `auto`, `cpu`, `cuda`, ...
    """

    base: Base
    real: Files
    synthetic: SyntheticSpec = SyntheticSpec()
    adapter: AdapterSpec = AdapterSpec()
    training: TrainingSpec = TrainingSpec()
    out: Folder | None = None
    device: str = "auto"


__all__ = ["DiscriminatorSpec", "DistillationSpec", "SourceSide", "SyntheticSpec", "TransferSpec"]
