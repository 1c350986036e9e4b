"""Client of servers with OpenAI's interface of chat completions: vLLM, SGLang, llama.cpp, Ollama, and paid services.

The key is read from the environment, and sent to the configured address only: redirects are refused.
"""

import base64
import contextlib
import http.client
import io
import ipaddress
import json
import os
import random
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dit_video.core.errors import MissingError, UserError

RETRIED_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""HTTP statuses of failures that may pass."""
_MAX_DELAY = 60.0
_MAX_BYTES = 1 << 24
"""Maximum bytes of an answer."""
_JPEG_QUALITY = 90
_MAX_REASON = 200


class RequestError(UserError):
    """A request that the server does not answer as it should, whereas others may be answered."""


class ChatAnswer(NamedTuple):
    """The text of an answer, and the numbers of tokens that the server counted."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """A server, its model, and how patiently it is asked. Threads share it.

    Raises:
      UserError: an address that is not http:// or https://.
    """

    url: str = "http://localhost:8000/v1"
    """Base address, to which /chat/completions is added."""
    model: str = ""
    """Name of the model, as the server knows it."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key, which servers on this machine do not need."""
    timeout: float = 120.0
    """Maximum seconds of a request."""
    retries: int = 5
    """Number of further tries of a request that failed for a passing reason, after 1, 2, 4, … seconds."""
    first_delay: float = 1.0
    """Seconds before the first of them."""
    usage: "TokenUsage" = field(default_factory=lambda: TokenUsage(), init=False, compare=False, repr=False)
    """Tokens of all answers."""

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise UserError(
                f"url={self.url} is invalid: it is an http address. Use one such as http://localhost:8000/v1"
            )

    def check(self) -> None:
        """Check that there is a model, and a key for a server on another machine.

        Raises:
          MissingError: the environment variable is not set.
          UserError: no model is named.
        """
        if not self.model:
            raise UserError(
                f"model='' is invalid: {self.url} has to know which one. Use a name that {self.url}/models lists"
            )
        if not os.environ.get(self.key_variable) and not self.is_local:
            raise MissingError(
                f"no key for {self.url}: {self.key_variable} is not set. Use export {self.key_variable}=…, or the name "
                "of another variable"
            )

    @property
    def is_local(self) -> bool:
        """Return True for a server on this machine."""
        host = urllib.parse.urlsplit(self.url).hostname or ""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(host).is_loopback
        return host == "localhost"

    def ask(self, prompt: str, frames: UInt8[np.ndarray, "T H W 3"], *, max_tokens: int) -> ChatAnswer:
        """Return the answer to a prompt with pictures.

        Raises:
          RequestError: the server refuses this request, or its answers are no chat completions.
          UserError: the server cannot be reached, denies access, or limits the rate for too long.
        """
        pictures = [{"type": "image_url", "image_url": {"url": make_data_uri(frame)}} for frame in frames]
        content = [*pictures, {"type": "text", "text": prompt}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            is_last = attempt == self.retries
            try:
                answer = _parse_answer(self._send(data))
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED_STATUSES or is_last:
                    raise self._make_error(error) from None
                self._wait(attempt, error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError) as error:
                if is_last:
                    raise self._make_connection_error(error) from error
                self._wait(attempt, None)
            else:
                self.usage.add(answer)
                return answer
        raise AssertionError("unreachable")

    def _send(self, data: bytes) -> bytes:
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", data, method="POST")
        request.add_header("Content-Type", "application/json")
        if key := os.environ.get(self.key_variable):
            request.add_header("Authorization", f"Bearer {key}")
        opener = urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] * self.is_local))
        with opener.open(request, timeout=self.timeout) as response:
            return response.read(_MAX_BYTES)

    def _wait(self, attempt: int, retry_after: str | None) -> None:
        delay = self.first_delay * 2**attempt * random.uniform(0.75, 1.25)
        with contextlib.suppress(TypeError, ValueError):
            delay = max(delay, float(retry_after or ""))
        time.sleep(min(_MAX_DELAY, delay))

    def _make_error(self, error: urllib.error.HTTPError) -> UserError:
        with contextlib.suppress(OSError, http.client.HTTPException):
            reason = _shorten(error.read(_MAX_BYTES).decode("utf-8", "replace")) or error.reason
            text = f"{self.url} answers {error.code} ({reason})"
            if error.code in (401, 403):
                return UserError(f"{text}. Check the key in {self.key_variable}")
            if error.code == 404 or 300 <= error.code < 400:
                return UserError(f"{text}. Check the address, which most often ends in /v1, and model={self.model}")
            if error.code == 429:
                return UserError(f"{text} to {self.retries + 1} tries. Run the same command later to continue")
            return RequestError(text)
        return RequestError(f"{self.url} answers {error.code}")

    def _make_connection_error(self, error: Exception) -> UserError:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ConnectionRefusedError | socket.gaierror):
            return UserError(f"{self.url} cannot be reached ({reason}). Start the server, or check the address")
        return RequestError(f"{self.url} gave no answer ({_shorten(str(reason)) or type(reason).__name__})")


@dataclass
class TokenUsage:
    """Counter of tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, answer: ChatAnswer) -> None:
        """Count the tokens of an answer."""
        with self._lock:
            self.prompt_tokens += answer.prompt_tokens
            self.completion_tokens += answer.completion_tokens


def make_data_uri(frame: UInt8[np.ndarray, "H W 3"]) -> str:
    """Return a frame as a JPEG in a data URI."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects become errors, since the key would go to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _parse_answer(content: bytes) -> ChatAnswer:
    """Return the answer in a response.

    Raises:
      RequestError: the model refuses to answer, answers nothing, or was cut.
      ValueError: the response is no chat completion.
    """
    try:
        document = json.loads(content)
        choice = document["choices"][0]
        message, usage = choice["message"], document.get("usage") or {}
        text, refusal = message.get("content") or "", message.get("refusal")
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        if not isinstance(text, str):
            raise TypeError("content")
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no chat completion: {_shorten(content[:1000].decode('utf-8', 'replace'))}") from error
    if refusal or choice.get("finish_reason") == "content_filter":
        raise RequestError(f"the model refuses to answer ({_shorten(str(refusal or 'content filter'))})")
    if choice.get("finish_reason") == "length":
        raise RequestError("the answer is longer than max_tokens")
    return ChatAnswer(text.strip(), tokens[0], tokens[1])


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]} …"
