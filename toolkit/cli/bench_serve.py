"""`toolkit bench-serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import Json, Overwrite, Quiet, Set, Smoke, is_spec, show, without_none


def bench_serve(
    server: Annotated[
        str, typer.Argument(help="Address such as http://127.0.0.1:8000; or a YAML spec.", show_default=False)
    ],
    model: Annotated[
        list[str],
        typer.Option(
            help="Model to ask for, the most popular first; may be given several times.",
            show_default="all that are listed",
        ),
    ] = [],  # noqa: B006 - typer reads the default, nobody changes it
    rate: Annotated[
        list[float],
        typer.Option(help="Requests per second, or inf; may be given several times.", show_default="4"),
    ] = [],  # noqa: B006 - as above
    requests: Annotated[int | None, typer.Option(min=1, help="Requests at each rate.", show_default="100")] = None,
    trace: Annotated[Path | None, typer.Option(help="File of arrivals, in place of rates.")] = None,
    zipf: Annotated[
        float | None, typer.Option(min=0, help="Exponent of the models' popularity.", show_default="0: all alike")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Most requests under way.", show_default="no bound")
    ] = None,
    prompt_words: Annotated[
        str | None, typer.Option(help="Words of a prompt.", metavar="N|LOW-HIGH", show_default="64")
    ] = None,
    shared_words: Annotated[
        int | None, typer.Option(min=0, help="Words that prompts begin with in common.", show_default="0")
    ] = None,
    max_tokens: Annotated[
        str | None, typer.Option(help="Tokens of an answer.", metavar="N|LOW-HIGH", show_default="32")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask the chat endpoint.")] = False,
    ttft: Annotated[float | None, typer.Option(min=0, help="Limit in seconds: time to the first token.")] = None,
    tpot: Annotated[float | None, typer.Option(min=0, help="Limit in seconds: time per token after it.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="TOOLKIT_API_KEY", help="Key that requests carry.", show_envvar=True)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG, SVG or PDF file to draw into.")] = None,
    overwrite: Overwrite = False,
    set_: Set = [],  # noqa: B006 - as above
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Load-test any server with OpenAI's API: throughput, latency, goodput, fairness."""
    from toolkit.jobs.bench_serve.run import bench_serve as run

    options = without_none(
        requests=requests,
        trace=str(trace) if trace else None,
        zipf=zipf,
        concurrency=concurrency,
        prompt_words=prompt_words,
        shared_words=shared_words,
        max_tokens=max_tokens,
        api_key=api_key,
    )
    options |= {name: value for name, value in (("models", model), ("rates", rate), ("chat", chat)) if value}
    limits = without_none(ttft=ttft, tpot=tpot)
    options |= {"limits": limits} if limits else {}
    spec = server if is_spec(server) else {"url": server}
    shown = {"plot": plot, "overwrite": overwrite, "quiet": quiet}
    show(run(spec, overrides=set_, options=options, smoke=smoke, **shown), json)
