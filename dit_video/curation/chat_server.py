"""Client of servers with OpenAI's interface of chat completions: vLLM, SGLang, llama.cpp, Ollama, and paid services.

The key is read from the environment, and sent to the configured address only: redirects are refused. No message holds
it, even if the server repeats it.
"""

import base64
import contextlib
import http.client
import io
import ipaddress
import json
import os
import random
import re
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
_MIN_SECRET = 12
"""Minimum length of a key that is secret; shorter ones are words such as EMPTY, for servers that need none."""


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
          UserError: no model is named, or the key is none.
        """
        if not self.model:
            raise UserError(
                f"model='' is invalid: {self.url} has to know which one. Use a name that {self.url}/models lists"
            )
        if not self._read_key() and not self.is_local:
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
          UserError: the server cannot be reached, denies access, or limits the rate for too long; or the key is none.
        """
        key = self._read_key()
        pictures = [{"type": "image_url", "image_url": {"url": make_data_uri(frame)}} for frame in frames]
        content = [*pictures, {"type": "text", "text": prompt}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            is_last = attempt == self.retries
            try:
                response = self._send(data, key)
                # An answer costs as much if it cannot be used.
                prompt_tokens, completion_tokens = self.usage.add(response)
                return ChatAnswer(_parse_text(response, key), prompt_tokens, completion_tokens)
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED_STATUSES or is_last:
                    raise self._make_error(error, key) from None
                self._wait(attempt, error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError) as error:
                if is_last:
                    # Not as its cause, whose text may hold the key.
                    raise self._make_connection_error(error, key) from None
                self._wait(attempt, None)
        raise AssertionError("unreachable")

    def _read_key(self) -> str:
        """Return the key without the spaces and line ends around it; empty if there is none."""
        key = os.environ.get(self.key_variable, "").strip()
        if not re.fullmatch("[!-~]*", key):
            raise UserError(
                f"the key in {self.key_variable} is invalid: it is one word of printable ASCII. Use export "
                f"{self.key_variable}=… with the key alone"
            )
        return key

    def _send(self, data: bytes, key: str) -> bytes:
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", data, method="POST")
        request.add_header("Content-Type", "application/json")
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        opener = urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] * self.is_local))
        with opener.open(request, timeout=self.timeout) as response:
            return response.read(_MAX_BYTES)

    def _wait(self, attempt: int, retry_after: str | None) -> None:
        delay = self.first_delay * 2**attempt * random.uniform(0.75, 1.25)
        with contextlib.suppress(TypeError, ValueError):
            delay = max(delay, float(retry_after or ""))
        time.sleep(min(_MAX_DELAY, delay))

    def _make_error(self, error: urllib.error.HTTPError, key: str) -> UserError:
        with contextlib.suppress(OSError, http.client.HTTPException):
            body = error.read(_MAX_BYTES).decode("utf-8", "replace")
            reason = _shorten(body, key) or _shorten(str(error.reason), key)
            text = f"{self.url} answers {error.code} ({reason})"
            if error.code in (401, 403):
                return UserError(f"{text}. Check the key in {self.key_variable}")
            if error.code == 404 or 300 <= error.code < 400:
                return UserError(f"{text}. Check the address, which most often ends in /v1, and model={self.model}")
            if error.code == 429:
                return UserError(f"{text} to {self.retries + 1} tries. Run the same command later to continue")
            return RequestError(text)
        return RequestError(f"{self.url} answers {error.code}")

    def _make_connection_error(self, error: Exception, key: str) -> UserError:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ConnectionRefusedError | socket.gaierror):
            return UserError(f"{self.url} cannot be reached ({reason}). Start the server, or check the address")
        return RequestError(f"{self.url} gave no answer ({_shorten(str(reason), key) or type(reason).__name__})")


@dataclass
class TokenUsage:
    """Counter of tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, content: bytes) -> tuple[int, int]:
        """Count the tokens of a response, and return those of the prompt and of the completion."""
        tokens = (0, 0)
        with contextlib.suppress(LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError):
            usage = json.loads(content)["usage"]
            tokens = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        with self._lock:
            self.prompt_tokens += tokens[0]
            self.completion_tokens += tokens[1]
        return tokens


def make_data_uri(frame: UInt8[np.ndarray, "H W 3"]) -> str:
    """Return a frame as a JPEG in a data URI."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects become errors, since the key would go to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _parse_text(content: bytes, key: str) -> str:
    """Return the text in a response.

    Raises:
      RequestError: the model refuses to answer, answers nothing, was cut, or repeats the key.
      ValueError: the response is no chat completion.
    """
    try:
        choice = json.loads(content)["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content") or "", message.get("refusal")
        if not isinstance(text, str):
            raise TypeError("content")
    except (LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"no chat completion: {_shorten(content.decode('utf-8', 'replace'), key)}") from None
    if refusal or choice.get("finish_reason") == "content_filter":
        raise RequestError(f"the model refuses to answer ({_shorten(str(refusal or 'content filter'), key)})")
    if choice.get("finish_reason") == "length":
        raise RequestError("the answer is longer than max_tokens")
    if len(key) >= _MIN_SECRET and key in text:
        raise RequestError("the answer holds the key")
    return text.strip()


def _shorten(text: str, key: str) -> str:
    """Return the beginning of a text on one line, without the key, which JSON may hold with slashes escaped."""
    if key:
        spellings = {key, key.replace("/", r"\/"), json.dumps(key)[1:-1]}
        text = re.sub("|".join(map(re.escape, spellings)), "[key]", text)
    text = " ".join(text.split())
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]} …"
