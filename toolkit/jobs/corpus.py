"""Write what a small base is trained from: the generated corpus, and a folder with its config and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from toolkit import specs
from toolkit.checkpoints.writer import staged
from toolkit.data.rows import read_rows, write_rows
from toolkit.embedded.corpus import documents
from toolkit.embedded.tokenizer import SPECIAL_TOKENS, build_tokenizer, learn_merges
from toolkit.specs import Spec
from toolkit.tables import Report, Table


class CorpusSpec(Spec):
    """What to write.

    Attributes:
        documents: of the training text.
        validation: further documents to measure the loss on.
        seed: of the text.
        context: most tokens of the model.
        merges: pairs of letters that its tokenizer has a token for, the most frequent ones of the training text.
        model: sizes, as `LlamaConfig` names them.
    """

    documents: Annotated[int, Field(ge=1)]
    validation: Annotated[int, Field(ge=1)] = 500
    seed: int = 0
    context: Annotated[int, Field(ge=16)] = 512
    merges: Annotated[int, Field(ge=0)] = 0
    model: dict[str, Any] = Field(default_factory=dict)


def write_corpus(
    spec: specs.Source | CorpusSpec, out: str | Path, *, overwrite: bool = False, quiet: bool = False
) -> Report:
    """Write `train.jsonl`, `validation.jsonl` and `model/`, a Llama without weights."""
    loaded = specs.load(spec, CorpusSpec)
    text = documents(loaded.seed)
    with staged(Path(out), overwrite=overwrite) as partial:
        write_rows(partial / "train.jsonl", islice(text, loaded.documents))
        write_rows(partial / "validation.jsonl", islice(text, loaded.validation))
        _write_model(loaded, partial)
        size = (partial / "train.jsonl").stat().st_size
    numbers = {"path": str(out), "documents": loaded.documents, "bytes": size}
    return Report(numbers, [Table(("corpus", str(out)), [[k, v] for k, v in numbers.items() if k != "path"])])


def _write_model(spec: CorpusSpec, out: Path) -> None:
    """Write config and tokenizer of a model of the corpus that lies beside them."""
    from transformers import LlamaConfig

    merges = learn_merges(_texts(out / "train.jsonl"), spec.merges) if spec.merges else []
    ids = {name: 256 + len(merges) + i for i, name in enumerate(SPECIAL_TOKENS)}
    config = LlamaConfig(
        vocab_size=256 + len(merges) + len(SPECIAL_TOKENS),
        max_position_embeddings=spec.context,
        bos_token_id=ids["<|bos|>"],
        eos_token_id=ids["<|end|>"],
        pad_token_id=ids["<|pad|>"],
        **spec.model,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out / "model")
    build_tokenizer(spec.context, merges).save_pretrained(out / "model")


def _texts(file: Path) -> Iterator[str]:
    for row in read_rows(file):
        yield from [row.data["text"]] if "text" in row.data else (m["content"] for m in row.data["messages"])
