"""`toolkit merge`."""

from __future__ import annotations

import json as json_
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from toolkit.cli.common import Json, Overwrite, Quiet, Resume, Set, Smoke, show, show_tables, size
from toolkit.errors import SpecError

_SAME = "Called as in mergekit-yaml"
_NOTHING = typer.Option(help="Changes how mergekit works, and nothing here.", rich_help_panel=_SAME)
_NoEffect = Annotated[bool | None, _NOTHING]


def merge(
    spec: Annotated[Path | None, typer.Argument(help="YAML file of the spec.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Argument(help="Folder to write; not needed with --dry-run.")] = None,
    set_: Set = [],  # noqa: B006 - typer reads the default, nobody changes it
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read and write no weights.")] = False,
    verify: Annotated[
        Path | None, typer.Option(help="Compute a sample of a finished merge again, and compare.", show_default=False)
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Write the i-th of n shares, i/n, of the output's files, to OUT.part-i-of-n.", show_default=False
        ),
    ] = None,
    join: Annotated[bool, typer.Option("--join", help="Check the shares beside OUT and put them together.")] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "--num-threads", "-j", min=1, help="Threads; by default one."),
    ] = None,
    shard_size: Annotated[
        str,
        typer.Option("--shard-size", "--out-shard-size", help="Largest size of an output file, such as 5GB or 200MB."),
    ] = "5GB",
    device: Annotated[
        str | None,
        typer.Option(help="What computes: cpu (the default); cuda or cuda:N, a GPU; auto, a GPU where there is one."),
    ] = None,
    hashes: Annotated[
        str, typer.Option(help="Identify the inputs' files by a hash of a sample of their blocks, or in full.")
    ] = "sample",
    random_seed: Annotated[
        int | None, typer.Option(help="Seed of random methods, where the spec names none.", rich_help_panel=_SAME)
    ] = None,
    write_model_card: Annotated[
        bool, typer.Option("--write-model-card/--no-write-model-card", rich_help_panel=_SAME, help="Write README.md.")
    ] = True,
    copy_tokenizer: Annotated[
        bool, typer.Option("--copy-tokenizer/--no-copy-tokenizer", rich_help_panel=_SAME, help="Copy its files.")
    ] = True,
    transformers_cache: Annotated[
        Path | None, typer.Option(help="Folder of the hub's cache.", rich_help_panel=_SAME, show_default=False)
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read pickled weights, weights only.")
    ] = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
    cuda: Annotated[
        bool, typer.Option("--cuda/--no-cuda", help="The same as --device cuda.", rich_help_panel=_SAME)
    ] = False,
    gpu_rich: Annotated[
        bool, typer.Option("--gpu-rich", help="The same as --device cuda.", rich_help_panel=_SAME)
    ] = False,
    lazy_unpickle: _NoEffect = None,
    low_cpu_memory: _NoEffect = None,
    read_to_gpu: _NoEffect = None,
    multi_gpu: _NoEffect = None,
    async_write: _NoEffect = None,
    clone_tensors: _NoEffect = None,
    allow_crimes: _NoEffect = None,
    trust_remote_code: _NoEffect = None,
    verbosity: Annotated[int, typer.Option("-v", count=True, help=_NOTHING.help, rich_help_panel=_SAME)] = 0,
    write_threads: Annotated[int | None, _NOTHING] = None,
    lora_merge_cache: Annotated[Path | None, _NOTHING] = None,
    lora_merge_dtype: Annotated[str | None, _NOTHING] = None,
    safe_serialization: Annotated[
        bool, typer.Option(help="Weights are always written as safetensors.", rich_help_panel=_SAME)
    ] = True,
) -> None:
    """Merge models, or LoRAs of one base, as a spec says. Runs mergekit's YAML."""
    if verify is not None:
        _verify(verify, allow_pickle, json, quiet)
        return
    if spec is None:
        raise SpecError("name the spec: toolkit merge SPEC OUT")
    if not safe_serialization:
        raise SpecError("--no-safe-serialization: weights are written as safetensors alone")
    if shard and join:
        raise SpecError("--shard writes a share and --join puts all together; give one of them")
    if hashes not in ("sample", "full"):
        raise SpecError(f"--hashes {hashes!r} is neither sample nor full")
    if transformers_cache is not None:
        os.environ["HF_HUB_CACHE"] = str(transformers_cache.expanduser())
    from toolkit.merge.plan import make_plan
    from toolkit.merge.run import merge as run

    seed = [] if random_seed is None else [f"seed={random_seed}"]
    options: dict[str, Any] = {"overrides": [*seed, *set_], "smoke": smoke, "allow_pickle": allow_pickle}
    options["shard_bytes"] = _shard_bytes(shard_size)
    options["device"] = device or ("cuda" if cuda or gpu_rich else "cpu")
    if dry_run:
        plan = make_plan(spec, **options)
        plan.inputs.close()
        print(json_.dumps(plan.to_dict(), indent=2)) if json else show_tables([plan.table()])
        return
    if out is None:
        raise SpecError("name the folder to write: toolkit merge SPEC OUT")
    if join:
        from toolkit.merge.parts import join as join_parts
        from toolkit.merge.record import Companions

        beside = Companions(hashes, write_model_card, copy_tokenizer)
        show(join_parts(spec, out, overwrite=overwrite, beside=beside, **options), json)
        return
    result = run(
        spec,
        out,
        resume=resume,
        overwrite=overwrite,
        workers=workers,
        hashes=hashes,
        card=write_model_card,
        tokenizer=copy_tokenizer,
        shard=shard,
        quiet=quiet,
        **options,
    )
    show(result, json)


def _shard_bytes(text: str) -> int:
    """Read a size; as in mergekit, whose default is 5B, a number of B means billions."""
    return size(f"{text[:-1]}GB" if text[:-1].isdecimal() and text[-1] in "bB" else text, "--shard-size")


def _verify(folder: Path, allow_pickle: bool, json: bool, quiet: bool) -> None:
    from toolkit.merge.verify import verify

    result = verify(folder, allow_pickle=allow_pickle, quiet=quiet)
    show(result, json)
    if not result.numbers["equal"]:
        raise typer.Exit(1)
