"""`toolkit serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from toolkit.cli.common import Quiet, Set, Smoke, TrustRemoteCode, is_spec, named_paths, with_trust, without_none


def serve(
    model: Annotated[
        str, typer.Argument(help="Base model: folder, hub id, toolkit:base; or a YAML spec.", show_default=False)
    ],
    adapter: Annotated[
        list[str], typer.Option(help="Adapter to serve; may be given several times.", metavar="NAME=PATH")
    ] = [],  # noqa: B006 - as above
    router: Annotated[str | None, typer.Option(help="Folder of a fitted router, for the model auto.")] = None,
    token_router: Annotated[
        list[str],
        typer.Option(
            help="Model that mixes adapters token by token, and the folder of its trained router; may be given several"
            " times.",
            metavar="NAME=FOLDER",
        ),
    ] = [],  # noqa: B006 - as above
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes a free one.", show_default="8000")
    ] = None,
    api_key: Annotated[
        list[str],
        typer.Option(
            envvar="TOOLKIT_API_KEY", help="Key that requests must carry; may be given several times.", metavar="KEY"
        ),
    ] = [],  # noqa: B006 - as above
    adapter_root: Annotated[
        list[str],
        typer.Option(help="Folder that clients may load adapters from; may be given several times.", metavar="FOLDER"),
    ] = [],  # noqa: B006 - as above
    adapter_folder: Annotated[
        list[str],
        typer.Option(
            help="Folder whose own folders are adapters: all are served, those that come later too; may be given"
            " several times.",
            metavar="FOLDER",
        ),
    ] = [],  # noqa: B006 - as above
    fine_tuning: Annotated[
        str | None,
        typer.Option(
            help="Train LoRAs beside requests, as /v1/fine_tuning/jobs asks for; folder of their files.",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Serve by replicas on Ray Serve, as the spec's ray block says.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default="auto")] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the weights.", show_default="as stored")] = None,
    max_requests: Annotated[
        int | None, typer.Option(min=1, help="Requests that run at once.", show_default="64")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    set_: Set = [],  # noqa: B006 - as above
    smoke: Smoke = False,
    quiet: Quiet = False,
) -> None:
    """Serve a base and its adapters over HTTP, in OpenAI's shape."""
    from toolkit.serving.serve import serve as run

    options = without_none(router=router, host=host, port=port, device=device, dtype=dtype)
    options |= {"api_key": api_key} if api_key else {}
    options |= {"adapter_roots": adapter_root} if adapter_root else {}
    options |= {"adapter_folders": adapter_folder} if adapter_folder else {}
    options |= {"fine_tuning": {"folder": fine_tuning}} if fine_tuning else {}
    if adapter:
        options["adapters"] = named_paths(adapter, "--adapter")
    if token_router:
        options["token_routers"] = named_paths(token_router, "--token-router")
    if max_requests:
        options["limits"] = {"max_requests": max_requests}
    spec = model if is_spec(model) else {"model": model}
    run(spec, overrides=with_trust(set_, trust_remote_code), options=options, smoke=smoke, ray=ray, quiet=quiet)
