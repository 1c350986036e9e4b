"""Tokenizers of pretrained text encoders, read from their files."""

import hashlib
import html
import importlib.util
import os
import re
import warnings
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int32

from dit_video.core.errors import MissingError, UserError

_VOCABULARY_FILES = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))
"""Files that hold the vocabulary: one of the first two, or both of the last (CLIP's)."""
TOKENIZER_FILES = "tokenizer.json, spiece.model, or vocab.json and merges.txt"


class PretrainedTokenizer:
    """A tokenizer from a local folder; no padding, the end token last, CLIP's start token first.

    `tokenizer.json` is read by the library that defines the format; its ids are the ones that models were trained with.
    Other files are converted by `transformers`, as CLIP's and a lone `spiece.model` need it.

    Letters that spell a special token, such as `</s>`, become that token, as in `transformers`' own pipelines.
    """

    def __init__(self, folder: str | os.PathLike, *, max_tokens: int, cleaned: bool = False):
        """Read the files, without downloads; with `cleaned`, texts go through `clean` first.

        Raises:
          MissingError: If the folder holds no tokenizer.
          UserError: If files can't be read, the tokenizer has no end token, or the limit leaves no room for one.
        """
        folder = Path(folder)
        if max_tokens < 2:
            raise UserError(f"max_tokens={max_tokens} is invalid: no room for a token and the end token. Use 2 or more")
        if not has_tokenizer(folder):
            raise MissingError(f"no tokenizer in {folder} ({TOKENIZER_FILES}); copy the model's own files there")
        tokenizer = _read_tokenizer(folder)
        # Some files ask for these; a text is cut below, and padded where it is embedded.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        end = tokenizer.encode("").ids[-1:]
        if not end or tokenizer.encode("a").ids[-1:] != end:
            raise UserError(f"the tokenizer in {folder} adds no end token to texts; copy the encoder's own tokenizer")
        self._tokenizer, self.max_tokens, self._cleaned = tokenizer, max_tokens, cleaned
        description = tokenizer.to_str()
        rules = f"{description} of cleaned texts" if cleaned else description
        self.identity = hashlib.sha256(rules.encode()).hexdigest()
        """Hash of the vocabulary and all rules, not of the files: two layouts of one tokenizer have the same."""
        self.max_id = max(tokenizer.get_vocab().values())

    def __call__(self, text: str) -> Int32[np.ndarray, " s"]:
        """Return the token ids of a text; one of more than `max_tokens` tokens is cut, with a warning."""
        text = clean(text) if self._cleaned else text
        return np.asarray(cut_tokens(self._tokenizer.encode(text).ids, self.max_tokens, text), np.int32)


def _read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Read a folder's tokenizer.

    Raises:
      UserError: If files can't be read.
    """
    path, fix = folder / "tokenizer.json", "copy the files again"
    if not path.is_file() and (folder / "spiece.model").is_file():
        fix = "copy the model's tokenizer.json there, too"
        if not importlib.util.find_spec("sentencepiece"):
            raise UserError(f"{folder} has only spiece.model: pip install sentencepiece, or {fix}")
    # transformers warns at import that torch is missing; its tokenizers do not need it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        if path.is_file():
            return tokenizers.Tokenizer.from_file(os.fspath(path))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True).backend_tokenizer
    except Exception as error:  # these libraries and their dependencies raise any type, down to a bare Exception
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"can't read the tokenizer in {folder} ({reason}); {fix}") from error


class CutTextWarning(UserWarning):
    """A text that is longer than a model reads."""


def cut_tokens(ids: list[int], max_tokens: int, text: str) -> list[int]:
    """Cut a text's ids to `max_tokens` with a warning, and keep the end token.

    Not done by the tokenizer, which would store the limit in itself while other threads use it.
    """
    if len(ids) <= max_tokens:
        return ids
    fix = "shorten it; only a model that is trained with a larger max_tokens reads more"
    message = f"a text of {len(ids)} tokens is cut to {max_tokens}: {text[:40]!r}…; {fix}"
    warnings.warn(message, CutTextWarning, stacklevel=3)
    return [*ids[: max_tokens - 1], ids[-1]]


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Return whether a folder has the files of a `PretrainedTokenizer`."""
    return any(all((Path(folder) / name).is_file() for name in names) for names in _VOCABULARY_FILES)


def clean(text: str) -> str:
    """Clean a prompt as diffusers' Wan pipeline does before tokenization.

    `ftfy` repairs mojibake and straightens quotes, HTML entities are resolved twice (`&amp;lt;` is `<`), and runs of
    white space become one space. Without `ftfy`, which is optional, texts with characters that it may change cause a
    warning.
    """
    if importlib.util.find_spec("ftfy"):
        import ftfy

        text = ftfy.fix_text(text)
    elif not text.isascii():
        fix = "pip install 'dit_video[wan]'"
        warnings.warn(
            f"ftfy is not installed: texts such as {text[:40]!r} are not repaired as Wan's are; {fix}", stacklevel=2
        )
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()
