"""A server of a tiny model with adapters, and clients of it."""

from __future__ import annotations

import httpx
import openai
import pytest

from tests.serving.http.described import Document
from toolkit.serving.engine import Engine
from toolkit.serving.serve import background_server
from toolkit.serving.spec import Limits


@pytest.fixture(scope="module")
def engine(base, loras):
    limits = Limits(max_requests=4, page_size=4, max_batch_tokens=64, cache_tokens=800)
    engine = Engine(str(base), {name: loras[name] for name in ("plain", "dora")}, limits=limits)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(engine):
    with background_server(engine) as address:
        yield address


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as found:
        yield found


@pytest.fixture
def http(url):
    """A client that holds every response against the OpenAPI document."""
    document = Document(httpx.get(f"{url}/openapi.json", trust_env=False).json())
    with document.client(url) as found:
        yield found
