"""Load transformers models and tokenizers from what users write, with errors that say what to do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from toolkit.checkpoints.adapters import is_adapter
from toolkit.checkpoints.locate import locate
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.data.tokenizer import Tokenizer
from toolkit.errors import CheckpointError, MissingError, ToolkitError, UnsupportedError

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
        CheckpointError: weights that are broken or not those of the config, or an adapter instead of a model.
        UnsupportedError: not a causal language model, or one that needs its own code.
    """
    import torch

    if isinstance(source, LoadedModel):
        return source
    if isinstance(source, tuple):
        name = getattr(source[0], "name_or_path", "") or type(source[0]).__name__
        return LoadedModel(name, *source)
    path = model_folder(source, code=trust_remote_code)
    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype or "auto", "attn_implementation": attention, "trust_remote_code": trust_remote_code}
    model = _read(AutoModelForCausalLM, source, path, options)
    model = model.to(device).eval()  # pyright: ignore[reportArgumentType]  # a decorator of transformers hides self
    return LoadedModel(str(source), model, load_tokenizer(source, trust_remote_code=trust_remote_code))


def load_encoder(
    source: str | Path, *, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> LoadedModel:
    """Load the body of any model: what is stored of a head stays unread, and a pooler need not be stored.

    Raises:
        MissingError: nothing there.
        CheckpointError: weights that are broken or not those of the config.
        UnsupportedError: not a model that transformers knows, or one that needs its own code.
    """
    from transformers import AutoModel

    path = model_folder(source, code=trust_remote_code)
    model = _read(AutoModel, source, path, {"trust_remote_code": trust_remote_code}, head=False)
    model = model.to(device).eval()  # pyright: ignore[reportArgumentType]  # as above
    return LoadedModel(str(source), model, load_tokenizer(source, trust_remote_code=trust_remote_code))


def init_model(
    source: str | Path, *, seed: int, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> LoadedModel:
    """Make a model with random float32 weights from a folder that holds a config and a tokenizer.

    Raises:
        MissingError: nothing there.
        CheckpointError: a broken config.
        UnsupportedError: not a causal language model, or one that needs its own code.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = locate(source, code=trust_remote_code)
    with explained(source), quiet_transformers():
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    return LoadedModel(str(source), model.to(device).eval(), tokenizer)


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load a tokenizer; one without a padding token pads with its end token."""
    from transformers import AutoTokenizer

    path = locate(source, code=trust_remote_code)
    with explained(source), quiet_transformers():
        tokenizer = cast(Tokenizer, AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code))
    # The engine and the renderer say themselves, with an error, when a text is too long.
    getattr(tokenizer, "deprecation_warnings", {})["sequence-length-is-longer-than-the-specified-maximum"] = True
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_folder(source: str | Path, *, code: bool = False) -> Path:
    """Return the folder of a full model, with safetensors whose headers have been checked.

    Args:
        source: a folder, a hub id, `toolkit:base`.
        code: also fetch the Python files that come with the model.

    Raises:
        MissingError: no model there.
        CheckpointError: an adapter, pickled weights alone, or broken files.
    """
    path = locate(source, code=code)
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
def explained(source: object) -> Iterator[None]:
    """Turn whatever transformers raises while it reads `source` into one line that says what to do.

    Raises:
        UnsupportedError: code of the model's own, a package that is not there, or a kind that is not known.
        CheckpointError: a config or a file that is not what it should be.
    """
    try:
        yield
    except ToolkitError:
        raise
    except ImportError as error:
        raise UnsupportedError(f"{source}: it needs a package that is not installed ({_line(error)})") from None
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedError(
                f"{source}: the model runs code of its own; allow it with --trust-remote-code, or in the spec"
            ) from None
        raise UnsupportedError(f"{source}: transformers cannot load it ({_line(error)})") from None
    except OSError as error:
        raise CheckpointError(f"{source}: transformers cannot load it ({_line(error)})") from None
    except Exception as error:  # a wrong config raises anything, from KeyError to ZeroDivisionError
        what = f"{type(error).__name__}: {_line(error)}"
        raise CheckpointError(f"{source}: transformers cannot load it ({what})") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _read(kind: Any, source: object, path: Path, options: Mapping[str, Any], *, head: bool = True) -> PreTrainedModel:
    """Read a checked folder with an auto class of transformers; every weight must come from there."""
    with explained(source), quiet_transformers():
        model, told = kind.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True, **options
        )
    _check_names(source, model, told, head)
    if getattr(model.config, "quantization_config", None) is None:
        _check_floats(source, path, model)
    return model


def _check_names(source: object, model: PreTrainedModel, told: Mapping[str, Any], head: bool) -> None:
    """Refuse weights that are not those of the config: transformers would make up what is missing."""
    quantized = getattr(model.config, "quantization_config", None) is not None
    missing = sorted(name for name in told["missing_keys"] if head or "pooler" not in name.split("."))
    other = sorted(f"{name} {list(stored)}, not {list(own)}" for name, stored, own in told["mismatched_keys"])
    strange = sorted(told["unexpected_keys"]) if head and not quantized else []
    for what, names in (
        ("lacks weights of the model that config.json describes", missing),
        ("holds weights of other shapes than config.json says", other),
        ("holds weights that the model of config.json does not have", strange),
    ):
        if names:
            more = f", and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{source}: {what} ({'; '.join(names[:3])}{more}); get its files anew, or correct config.json"
            )


def _check_floats(source: object, path: Path, model: PreTrainedModel) -> None:
    """Refuse integers where the model has floats: the codes of a quantized model, read as if they were its weights."""
    floats = {name for name, value in model.named_parameters() if value.is_floating_point()}
    with open_checkpoint(path) as stored:
        for name, info in stored.tensors.items():
            if not info.dtype.floating and floats & {name, f"{model.base_model_prefix}.{name}"}:
                raise CheckpointError(
                    f"{source}: {name} is stored as {info.dtype.name}, but the model computes with floats;"
                    " config.json lacks the quantization_config of these weights"
                )
