"""Write what a small base is trained from: the generated corpus, and a folder with its config and tokenizer."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from toolkit import specs
from toolkit.checkpoints.writer import staged
from toolkit.data.rows import write_rows
from toolkit.embedded.corpus import documents
from toolkit.embedded.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, build_tokenizer
from toolkit.specs import Spec
from toolkit.tables import Report, Table


class CorpusSpec(Spec):
    """What to write.

    Attributes:
        documents: of the training text.
        validation: further documents to measure the loss on.
        seed: of the text.
        context: most tokens of the model.
        model: sizes, as `LlamaConfig` names them.
    """

    documents: Annotated[int, Field(ge=1)]
    validation: Annotated[int, Field(ge=1)] = 500
    seed: int = 0
    context: Annotated[int, Field(ge=16)] = 512
    model: dict[str, Any] = Field(default_factory=dict)


def write_corpus(
    spec: specs.Source | CorpusSpec, out: str | Path, *, overwrite: bool = False, quiet: bool = False
) -> Report:
    """Write `train.jsonl`, `validation.jsonl` and `model/`, a Llama without weights."""
    from transformers import LlamaConfig

    loaded = specs.load(spec, CorpusSpec)
    ids = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=loaded.context,
        bos_token_id=ids["<|bos|>"],
        eos_token_id=ids["<|end|>"],
        pad_token_id=ids["<|pad|>"],
        **loaded.model,
    )
    config.architectures = ["LlamaForCausalLM"]
    text = documents(loaded.seed)
    with staged(Path(out), overwrite=overwrite) as partial:
        write_rows(partial / "train.jsonl", islice(text, loaded.documents))
        write_rows(partial / "validation.jsonl", islice(text, loaded.validation))
        config.save_pretrained(partial / "model")
        build_tokenizer(loaded.context).save_pretrained(partial / "model")
        size = (partial / "train.jsonl").stat().st_size
    numbers = {"path": str(out), "documents": loaded.documents, "bytes": size}
    return Report(numbers, [Table(("corpus", str(out)), [[k, v] for k, v in numbers.items() if k != "path"])])
