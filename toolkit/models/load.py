"""Load transformers models and tokenizers from what users write, with errors that say what to do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from toolkit.checkpoints.adapters import is_adapter
from toolkit.checkpoints.locate import locate
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.data.tokenizer import Tokenizer
from toolkit.errors import CheckpointError, MissingError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model with its tokenizer.

    Attributes:
        source: what the user called it.
        model: in evaluation mode.
        tokenizer: of the model.
    """

    source: str
    model: PreTrainedModel
    tokenizer: Tokenizer


def pick_device(name: str = "auto") -> torch.device:
    """Return the named device; `auto` is the accelerator if there is one, else the CPU.

    Raises:
        UnsupportedError: the device is not there.
    """
    import torch

    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(f"device {name!r} cannot be used ({str(error).splitlines()[0]})") from None
    return torch.device(name)


def load_model(
    source: Any,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        source: a folder, a hub id, `toolkit:base`, or a pair `(model, tokenizer)` of objects, taken as they are.
        device: where to put it.
        dtype: of the weights; by default as stored, but float32 on a CPU.
        attention: name of the attention implementation.
        trust_remote_code: run code that comes with the model.

    Raises:
        MissingError: nothing there.
        CheckpointError: broken weights, or an adapter instead of a model.
        UnsupportedError: not a causal language model, or one that needs its own code.
    """
    import torch

    if isinstance(source, LoadedModel):
        return source
    if isinstance(source, tuple):
        name = getattr(source[0], "name_or_path", "") or type(source[0]).__name__
        return LoadedModel(name, *source)
    path = model_folder(source)
    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    from transformers import AutoModelForCausalLM

    with _explained(source), quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    model = model.to(device).eval()  # pyright: ignore[reportArgumentType]  # a decorator of transformers hides self
    return LoadedModel(str(source), model, load_tokenizer(source, trust_remote_code=trust_remote_code))


def init_model(source: str | Path, *, seed: int, device: torch.device | str = "cpu") -> LoadedModel:
    """Make a model with random float32 weights from a folder that holds a config and a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = locate(source)
    with _explained(source), quiet_transformers():
        config: PretrainedConfig = AutoConfig.from_pretrained(path)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return LoadedModel(str(source), model.to(device).eval(), load_tokenizer(source))


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load a tokenizer; one without a padding token pads with its end token."""
    from transformers import AutoTokenizer

    with _explained(source), quiet_transformers():
        tokenizer = cast(Tokenizer, AutoTokenizer.from_pretrained(locate(source), trust_remote_code=trust_remote_code))
    # The engine and the renderer say themselves, with an error, when a text is too long.
    getattr(tokenizer, "deprecation_warnings", {})["sequence-length-is-longer-than-the-specified-maximum"] = True
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_folder(source: str | Path) -> Path:
    """Return the folder of a full model whose weights have been checked."""
    path = locate(source)
    if path.is_dir() and is_adapter(path):
        raise CheckpointError(f"{source}: an adapter, not a model; name its base, and the adapter apart")
    if not path.is_dir():
        raise MissingError(f"{source}: not a model folder")
    if not (path / "config.json").is_file():
        raise MissingError(f"{source}: no config.json in this folder")
    open_checkpoint(path).close()
    return path


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the loading bars, notices and deprecations of transformers and PEFT inside the block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _explained(source: object) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise UnsupportedError(
                f"{source}: the model runs code of its own; allow it with --trust-remote-code, or in the spec"
            ) from None
        raise UnsupportedError(f"{source}: transformers cannot load it ({text[:200]})") from None
    except (OSError, KeyError) as error:
        raise CheckpointError(f"{source}: transformers cannot load it ({' '.join(str(error).split())[:200]})") from None
