"""Any server with OpenAI's API as a model of a cascade."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from toolkit.errors import RequestError, UnsupportedError
from toolkit.routing.cascade import Completion


@dataclass(frozen=True)
class Endpoint:
    """A model behind `/v1/chat/completions`.

    Attributes:
        url: of the API, such as `http://127.0.0.1:8000/v1`.
        name: of the model.
        key_variable: environment variable that holds the API key; the key itself is in no file and no message.
        max_tokens: of an answer.
        input_price: cost of a million tokens of prompt.
        output_price: cost of a million tokens of answer.
        logprobs: ask for the tokens' probabilities, which `confidence` needs; not every server gives them.
        timeout: in seconds.
        options: further fields of the request.
    """

    url: str
    name: str
    key_variable: str | None = None
    max_tokens: int = 512
    input_price: float = 0.0
    output_price: float = 0.0
    logprobs: bool = True
    timeout: float = 120.0
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, prompt: str) -> Completion:
        """Answer one prompt, greedily unless `options` say otherwise.

        Raises:
            RequestError: no answer, or one that is not of OpenAI's form.
            UnsupportedError: the key's variable is not set, or httpx is not installed.
        """
        body: dict[str, Any] = {"model": self.name, "messages": [{"role": "user", "content": prompt}]}
        body |= {"max_tokens": self.max_tokens, "temperature": 0} | ({"logprobs": True} if self.logprobs else {})
        answer = self._post(body | self.options)
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            text = choice["message"]["content"] or ""
            tokens = ((choice.get("logprobs") or {}).get("content")) or []
            logprobs = tuple(float(token["logprob"]) for token in tokens)
            cost = self.input_price * usage.get("prompt_tokens", 0)
            cost += self.output_price * usage.get("completion_tokens", 0)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise RequestError(f"{self.url}: the answer is not a chat completion") from None
        return Completion(text, logprobs, cost / 1e6)

    def _post(self, body: dict[str, Any]) -> Any:
        try:
            import httpx
        except ModuleNotFoundError:
            raise UnsupportedError("endpoints need httpx: pip install 'composition-toolkit[serve]'") from None
        headers = {}
        if self.key_variable is not None:
            if not os.environ.get(self.key_variable):
                raise UnsupportedError(f"set {self.key_variable} to the API key of {self.url}")
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        try:
            response = httpx.post(
                f"{self.url.rstrip('/')}/chat/completions", json=body, headers=headers, timeout=self.timeout
            )
            if response.status_code != 200:
                raise RequestError(f"{self.url}: answered {response.status_code}: {response.text[:200]}")
            return response.json()
        except (httpx.HTTPError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"{self.url}: no answer ({type(error).__name__})") from None
