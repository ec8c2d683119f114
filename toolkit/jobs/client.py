"""A small client of our own server, for jobs that measure through HTTP what users get through HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from toolkit.errors import UnsupportedError
from toolkit.progress import Progress
from toolkit.serving.prompts import Prompt

CONCURRENT = 64
"""Requests under way at once."""


def ask(url: str, prompts: Sequence[tuple[Prompt, str, int]], progress: Progress) -> list[str]:
    """Send requests, many at once, greedily decoded; return the answers in order.

    Args:
        url: of the server.
        prompts: prompt, model and most tokens of each.
        progress: counts answers.
    """
    return asyncio.run(_ask_all(url, prompts, progress))


async def _ask_all(url: str, prompts: Sequence[tuple[Prompt, str, int]], progress: Progress) -> list[str]:
    import httpx

    slots = asyncio.Semaphore(CONCURRENT)
    limits = httpx.Limits(max_connections=CONCURRENT)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600, trust_env=False) as client:

        async def one(prompt: Prompt, model: str, limit: int) -> str:
            chat = not isinstance(prompt, str)
            body = {"model": model, "max_tokens": limit, "temperature": 0}
            body |= {"messages": prompt} if chat else {"prompt": prompt}
            async with slots:
                path = "/v1/chat/completions" if chat else "/v1/completions"
                response = await client.post(path, json=body)
            if response.status_code != 200:
                raise UnsupportedError(f"the server answered {response.status_code}: {response.text}")
            progress.advance()
            choice = response.json()["choices"][0]
            return choice["message"]["content"] if chat else choice["text"]

        return await asyncio.gather(*(one(*prompt) for prompt in prompts))
