"""The tokenizer that a pretrained encoder was trained with, read from its files."""

import hashlib
import html
import importlib.util
import os
import re
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from dit_video.core.errors import MissingError, UserError

_FILES = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))
"""that hold the vocabulary: one of these, or both of the last (CLIP's)"""
TOKENIZER_FILES = "tokenizer.json, spiece.model, or vocab.json and merges.txt"


class PretrainedTokenizer:
    """A tokenizer of `transformers` from a local folder; no padding, the end token last, CLIP's start token first.

    Letters that spell a special token, such as `</s>`, are read as that token, as in `transformers`' own pipelines.
    """

    def __init__(self, folder: str | os.PathLike, *, max_tokens: int, cleaned: bool = False):
        """Read the files; nothing is fetched. `cleaned`: whether texts are given to `clean` first.

        Raises:
          MissingError: the folder holds no tokenizer.
          UserError: files that can't be read, a tokenizer without an end token, or a limit that leaves no room for one.
        """
        folder = Path(folder)
        if max_tokens < 2:
            raise UserError(f"max_tokens {max_tokens} leaves no room for a token and the end token; use 2 or more")
        if not holds_tokenizer(folder):
            raise MissingError(f"{folder} holds no tokenizer ({TOKENIZER_FILES}); copy the model's own files there")
        alone = not (folder / "tokenizer.json").is_file() and (folder / "spiece.model").is_file()
        if alone and not importlib.util.find_spec("sentencepiece"):
            raise UserError(
                f"{folder} has spiece.model alone, which needs a library to be read: pip install sentencepiece, or "
                "copy the model's tokenizer.json there too"
            )
        # Without torch, transformers advises at import to install it; its tokenizers need none.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True)
            ends = self._tokenizer("")["input_ids"][-1:] == [self._tokenizer.eos_token_id]
            description = self._tokenizer.backend_tokenizer.to_str()
        except Exception as error:  # the libraries below raise whatever they like, down to a bare Exception
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(f"the tokenizer in {folder} can't be read ({reason}); copy the files again") from error
        if not ends:
            raise UserError(f"the tokenizer in {folder} puts no end token after a text; copy the encoder's own there")
        self.max_tokens, self._cleaned = max_tokens, cleaned
        rules = f"{description} of cleaned texts" if cleaned else description
        self.identity = hashlib.sha256(rules.encode()).hexdigest()
        """of the whole vocabulary and all rules, not of the files: two layouts of one tokenizer are one"""
        self.largest_id = max(self._tokenizer.get_vocab().values())

    def __call__(self, text: str) -> Int32[np.ndarray, " s"]:
        """The ids of a text and its end. A text of more than `max_tokens` loses its end, with a warning."""
        text = clean(text) if self._cleaned else text
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > self.max_tokens:
            warnings.warn(
                f"a text of {len(ids)} tokens is cut to {self.max_tokens}: {text[:40]!r}…; shorten it, or use a larger "
                "max_tokens",
                stacklevel=2,
            )
            # Not by the tokenizer, which would note the limit in itself: other threads are using it.
            ids = [*ids[: self.max_tokens - 1], ids[-1]]
        return np.asarray(ids, np.int32)


def holds_tokenizer(folder: str | os.PathLike) -> bool:
    """Whether a folder has the files that a `PretrainedTokenizer` is read from."""
    return any(all((Path(folder) / name).is_file() for name in names) for names in _FILES)


def clean(text: str) -> str:
    """A prompt as diffusers' Wan pipeline cleans it before it is tokenized.

    Mojibake is repaired where `ftfy` is installed (not a dependency; diffusers makes the same difference), HTML
    entities are resolved twice (`&amp;lt;` is `<`), and runs of white space become one space.
    """
    if importlib.util.find_spec("ftfy"):
        import ftfy

        text = ftfy.fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()
