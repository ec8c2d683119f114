"""The byte-level tokenizer of the embedded base, and others like it with merged letters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
BOS, END, PAD = range(256, 259)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message.role not in ('system', 'user', 'assistant') -%}"
    "{{- raise_exception('unknown role: ' + message.role) -}}"
    "{%- endif -%}"
    "{{- '<|' + message.role + '|>' -}}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message.content + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def byte_symbols() -> list[str]:
    """Return the printable character that stands for each byte, in byte order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def build_tokenizer(model_max_length: int = 512, merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose first 256 ids are the byte values, followed by merged pairs and the special tokens.

    Args:
        model_max_length: most tokens of a text.
        merges: pairs of letters, or of what was merged before, that become one token, as `learn_merges` finds them.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    symbols = [*byte_symbols(), *(first + second for first, second in merges)]
    vocabulary = {symbol: token for token, symbol in enumerate(symbols)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = _splitter(words=bool(merges))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=model_max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def learn_merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Return the `count` pairs that byte-pair encoding merges in some texts, none across the borders of a word.

    Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2015, arXiv:1508.07909.
    """
    from tokenizers import Tokenizer, models, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _splitter(words=True)
    trainer = trainers.BpeTrainer(vocab_size=256 + count, initial_alphabet=byte_symbols(), show_progress=False)
    learner.train_from_iterator(texts, trainer)
    return [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]


def _splitter(*, words: bool) -> Any:
    """Return what turns bytes into symbols, and where asked cuts the letters of words from all else."""
    from tokenizers import Regex, pre_tokenizers

    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if not words:
        return symbols
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("[A-Za-z]+"), "isolated"), symbols])
