"""Expansion of prompts: a language model writes a short prompt as models read in training, with all that is seen."""

import hashlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import jax

from dit_video.core.chat import ChatServer, RequestError
from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.distributed.exchange import broadcast_values

INSTRUCTIONS = """\
Rewrite the user's text as a prompt for a model that makes videos from text. Keep what it asks for, and every \
name, number and quotation; add what a viewer would see. Say in one paragraph of about 80 words, in this order: \
the subject and what it looks like, what it does from the beginning to the end, the surroundings, the light, the \
style, and how the camera is placed and moves. Write plainly, in the present tense. If the text is an instruction, \
describe a video of it. Answer with the prompt alone, in the language of the text."""
"""Instructions for the language model, where a model's authors have not said what they ask for."""
_MAX_ORIGINALS = 1000

Prompted = TypeVar("Prompted")


class ExpandedPrompt(str):
    """A prompt that a language model has written from another one, which recipes of samples name."""

    original: str
    """The prompt as it was."""

    def __new__(cls, text: str, original: str) -> "ExpandedPrompt":
        """Return the prompt `text`."""
        prompt = super().__new__(cls, text)
        prompt.original = original
        return prompt


@dataclass(frozen=True, kw_only=True)
class PromptExpander:
    """A language model that expands prompts, once each: results are cached in a folder.

    Of several processes, which sample together, the first one asks.
    """

    server: ChatServer
    instructions: str = INSTRUCTIONS
    max_tokens: int = 4096
    """Maximum length of an answer in tokens, with those that a model thinks in."""
    cache: Path | None = None
    """Folder of results; None for none."""
    _originals: dict[str, str] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __call__(self, prompt: str) -> str:
        """Return a prompt expanded; an empty one, and one that is expanded already, as it is.

        Raises:
          MissingError: If the package openai is not installed, or there is no key.
          UserError: If the server cannot be reached, refuses the request, or its answer is none.
        """
        original = prompt.strip()
        if not original or isinstance(prompt, ExpandedPrompt):
            return prompt
        text, *_ = broadcast_values(self._try(original) if jax.process_index() == 0 else "")
        if isinstance(text, UserError):
            raise text
        if len(self._originals) < _MAX_ORIGINALS:
            self._originals[text] = original
        return ExpandedPrompt(text, original)

    def _try(self, original: str) -> str | UserError:
        """Return a prompt expanded, or the error."""
        try:
            return self._read_or_ask(original)
        except UserError as error:
            return error

    def _read_or_ask(self, original: str) -> str:
        file = None if self.cache is None else self.cache / f"{self._hash(original)}.json"
        if file is not None and file.is_file():
            return str(read_json(file)["text"])
        self.server.check()
        answer = self.server.ask(original, max_tokens=self.max_tokens, instructions=self.instructions)
        text = _clean(answer)
        if not text:
            raise RequestError(f"{self.server.url} answers nothing. Use another model, or do without expansion")
        if file is not None:
            write_json(file, {"prompt": original, "text": text, "model": self.server.model})
        return text

    def recall(self, prompt: str) -> str:
        """Return a prompt as `ExpandedPrompt` if it was made by this expander, such as one that a page sends back."""
        original = self._originals.get(prompt)
        return prompt if original is None else ExpandedPrompt(prompt, original)

    def expand(self, value: Prompted) -> Prompted:
        """Return a request or a task with its prompt expanded.

        One without a prompt stays as it is, and so does a task that goes by the difference of its prompt from another
        description (`source`).
        """
        prompt = getattr(value, "prompt", None)
        if not prompt or getattr(value, "source", None):
            return value
        return replace(value, prompt=self(prompt))  # type: ignore[type-var]  # both are dataclasses

    def _hash(self, prompt: str) -> str:
        content: Any = (self.server.url, self.server.model, self.instructions, self.max_tokens, prompt)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:32]


def _clean(answer: str) -> str:
    """Return an answer as one paragraph, without what the model thought and without quotes around all of it."""
    answer = answer.rpartition("</think>")[2]  # whose opening may be a part of the server's template
    text = " ".join(answer.partition("<think>")[0].split())
    quoted = re.fullmatch(r"[\"“](.*)[\"”]", text)
    return text if quoted is None or re.search(r"[\"“”]", quoted[1]) else quoted[1]
