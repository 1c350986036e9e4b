"""Language models on a server with OpenAI's interface: vLLM, SGLang, Ollama, or a paid service.

The key is read from the environment, and sent to the configured address only: redirects are refused. No message holds
it, even if the server repeats it. Needs the extra `captions`.
"""

import base64
import contextlib
import functools
import io
import ipaddress
import json
import os
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dit_video.core.errors import MissingError, UserError

if TYPE_CHECKING:
    import openai

_JPEG_QUALITY = 90
_MAX_REASON = 200
_MIN_SECRET = 12
"""Minimum length of a key that is secret; shorter ones are words such as EMPTY, for servers that need none."""


class RequestError(UserError):
    """A request that the server does not answer as it should, whereas others may be answered."""


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """A server, its model, and how patiently it is asked. Threads share it.

    Raises:
      UserError: If the address does not begin with http:// or https://.
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
    """Number of further tries of a request that failed for a passing reason: after 0.5, 1, 2, … seconds, at most 8, or
    when the server says."""
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
          MissingError: If the package openai is not installed, or the environment variable is not set.
          UserError: If no model is named, or the key is none.
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
        _ = self._client

    @property
    def is_local(self) -> bool:
        """Return True for a server on this machine."""
        host = urllib.parse.urlsplit(self.url).hostname or ""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(host).is_loopback
        return host == "localhost"

    def ask(
        self,
        prompt: str,
        frames: UInt8[np.ndarray, "T H W 3"] | None = None,
        *,
        max_tokens: int,
        instructions: str | None = None,
    ) -> str:
        """Return the answer to a prompt, perhaps with pictures, by a model that gets these instructions first.

        Raises:
          RequestError: If the server refuses this request, or its answer is no chat completion.
          UserError: If the server cannot be reached, denies access, limits the rate for too long, or the key is none.
        """
        key, client = self._read_key(), self._client
        import httpx2  # what openai sends requests with
        import openai

        content: Any = prompt
        if frames is not None:
            pictures = [{"type": "image_url", "image_url": {"url": make_data_uri(frame)}} for frame in frames]
            content = [*pictures, {"type": "text", "text": prompt}]
        system: Any = [] if instructions is None else [{"role": "system", "content": instructions}]
        # Errors have no cause, whose text may hold the key.
        try:
            response = client.chat.completions.with_raw_response.create(
                model=self.model, messages=[*system, {"role": "user", "content": content}], max_tokens=max_tokens
            )
        except openai.APIStatusError as error:
            raise self._make_error(error.status_code, _shorten(error.response.text, key)) from None
        except openai.APIConnectionError as error:
            reason = _shorten(str(error.__cause__ or error), key)
            if isinstance(error.__cause__, httpx2.ConnectError):
                fix = "Start the server, or check the address"
                raise UserError(f"{self.url} cannot be reached ({reason}). {fix}") from None
            raise RequestError(f"{self.url} gave no answer ({reason or type(error).__name__})") from None
        self.usage.add(response.text)  # an answer costs as much if it cannot be used
        return _parse_text(response.text, key)

    @functools.cached_property
    def _client(self) -> "openai.OpenAI":
        try:
            import openai
        except ModuleNotFoundError as error:
            raise MissingError(
                f"chat servers need the package openai ({error}); run pip install -e '.[captions]'"
            ) from error
        return openai.OpenAI(
            base_url=self.url,
            api_key=self._read_key() or "EMPTY",
            timeout=self.timeout,
            max_retries=self.retries,
            # A redirect would take the key to another address; a server on this machine is reached without a proxy.
            http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=not self.is_local),
        )

    def _read_key(self) -> str:
        """Return the key without the spaces and line ends around it; empty if there is none."""
        key = os.environ.get(self.key_variable, "").strip()
        if not re.fullmatch("[!-~]*", key):
            raise UserError(
                f"the key in {self.key_variable} is invalid: it is one word of printable ASCII. Use export "
                f"{self.key_variable}=… with the key alone"
            )
        return key

    def _make_error(self, status: int, reason: str) -> UserError:
        text = f"{self.url} answers {status} ({reason})"
        if status in (401, 403):
            return UserError(f"{text}. Check the key in {self.key_variable}")
        if status == 404 or 300 <= status < 400:
            return UserError(f"{text}. Check the address, which most often ends in /v1, and model={self.model}")
        if status == 429:
            return UserError(f"{text} to {self.retries + 1} tries. Run the same command later to continue")
        return RequestError(text)


@dataclass
class TokenUsage:
    """Counter of tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, response: str) -> None:
        """Count the tokens of a response, as far as it says how many it took."""
        with contextlib.suppress(LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError):
            usage = json.loads(response)["usage"]
            prompt, completion = (int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion"))
            with self._lock:
                self.prompt_tokens += prompt
                self.completion_tokens += completion


def make_data_uri(frame: UInt8[np.ndarray, "H W 3"]) -> str:
    """Return a frame as a JPEG in a data URI."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _parse_text(response: str, key: str) -> str:
    """Return the text in a response.

    Raises:
      RequestError: If the response is no chat completion, or the model refuses to answer, was cut, or repeats the key.
    """
    try:
        choice = json.loads(response)["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content") or "", message.get("refusal")
        if not isinstance(text, str):
            raise TypeError("content")
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        raise RequestError(f"the answer is no chat completion: {_shorten(response, key)}") from None
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
