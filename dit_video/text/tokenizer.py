"""Tokenizers of pretrained text encoders, read from their files."""

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

_VOCABULARY_FILES = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))
"""Files that hold the vocabulary: one of the first two, or both of the last (CLIP's)."""
TOKENIZER_FILES = "tokenizer.json, spiece.model, or vocab.json and merges.txt"


class PretrainedTokenizer:
    """A tokenizer of `transformers` from a local folder; no padding, the end token last, CLIP's start token first.

    Letters that spell a special token, such as `</s>`, become that token, as in `transformers`' own pipelines.
    """

    def __init__(self, folder: str | os.PathLike, *, max_tokens: int, cleaned: bool = False):
        """Read the files, without downloads; with `cleaned`, texts go through `clean` first.

        Raises:
          MissingError: the folder holds no tokenizer.
          UserError: files that can't be read, a tokenizer without an end token, or a limit that leaves no room for one.
        """
        folder = Path(folder)
        if max_tokens < 2:
            raise UserError(f"max_tokens={max_tokens} is invalid: no room for a token and the end token. Use 2 or more")
        if not has_tokenizer(folder):
            raise MissingError(f"no tokenizer in {folder} ({TOKENIZER_FILES}); copy the model's own files there")
        needs_sentencepiece = not (folder / "tokenizer.json").is_file() and (folder / "spiece.model").is_file()
        if needs_sentencepiece and not importlib.util.find_spec("sentencepiece"):
            raise UserError(f"{folder} has only spiece.model: pip install sentencepiece, or copy tokenizer.json there")
        # transformers warns at import that torch is missing; its tokenizers do not need it.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True)
            has_end_token = self._tokenizer("")["input_ids"][-1:] == [self._tokenizer.eos_token_id]
            description = self._tokenizer.backend_tokenizer.to_str()
        except Exception as error:  # transformers and its dependencies raise any type, down to a bare Exception
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(f"can't read the tokenizer in {folder} ({reason}); copy the files again") from error
        if not has_end_token:
            raise UserError(f"the tokenizer in {folder} adds no end token to texts; copy the encoder's own tokenizer")
        self.max_tokens, self._cleaned = max_tokens, cleaned
        rules = f"{description} of cleaned texts" if cleaned else description
        self.identity = hashlib.sha256(rules.encode()).hexdigest()
        """Hash of the vocabulary and all rules, not of the files: two layouts of one tokenizer have the same."""
        self.max_id = max(self._tokenizer.get_vocab().values())

    def __call__(self, text: str) -> Int32[np.ndarray, " s"]:
        """Return the token ids of a text; one of more than `max_tokens` tokens is cut, with a warning."""
        text = clean(text) if self._cleaned else text
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        return np.asarray(cut_tokens(ids, self.max_tokens, text), np.int32)


def cut_tokens(ids: list[int], max_tokens: int, text: str) -> list[int]:
    """Cut a text's ids to `max_tokens` with a warning, and keep the end token.

    Not done by the tokenizer, which would store the limit in itself while other threads use it.
    """
    if len(ids) <= max_tokens:
        return ids
    message = f"a text of {len(ids)} tokens is cut to {max_tokens}: {text[:40]!r}…; shorten it, or increase max_tokens"
    warnings.warn(message, stacklevel=3)
    return [*ids[: max_tokens - 1], ids[-1]]


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Return whether a folder has the files of a `PretrainedTokenizer`."""
    return any(all((Path(folder) / name).is_file() for name in names) for names in _VOCABULARY_FILES)


def clean(text: str) -> str:
    """Clean a prompt as diffusers' Wan pipeline does before tokenization.

    Mojibake is repaired if `ftfy` is installed (it is optional, as in diffusers), HTML entities are resolved twice
    (`&amp;lt;` is `<`), and runs of white space become one space.
    """
    if importlib.util.find_spec("ftfy"):
        import ftfy

        text = ftfy.fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()
