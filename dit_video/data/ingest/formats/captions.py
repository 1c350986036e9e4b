"""Parsing and cleaning of captions.

Surrounding white space is stripped; white space and line breaks inside a caption are kept. Empty captions and
duplicates are dropped. A clip whose caption is too long or not UTF-8 is rejected with the reason: such a caption is
more likely a wrong file than a typo, and a clip that silently lost its caption would train the unconditional model.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dit_video.data.ingest.formats.types import UnusableClipError

MAX_CAPTION_BYTES = 64 << 10
"""Maximum size of a caption in bytes of UTF-8, about 10,000 words."""
MAX_FILE_BYTES = 16 << 20
"""Maximum size of a caption file in bytes; its JSON may hold much more than captions."""
TOO_LARGE = f"has {{:,}} bytes, {MAX_FILE_BYTES:,} is the limit of a caption file"
"""Reason with the size of a caption file, to be formatted."""
CAPTION_FIELDS = ("text", "caption", "captions", "prompt", "cap")
"""Columns and JSON fields that hold captions; each is a string or, in JSON, a list of strings."""
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Suffixes of caption files, in the order in which a clip's captions are read from several files."""


def clean_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the captions stripped, without empty ones and duplicates.

    Raises:
      UnusableClipError: a caption is too long, or cannot be encoded as UTF-8 (it has half of a surrogate pair).
    """
    unique = dict.fromkeys(text for text in map(str.strip, texts) if text)
    for text in unique:
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise UnusableClipError("its caption is not UTF-8") from error
        if size > MAX_CAPTION_BYTES:
            raise UnusableClipError(f"its caption has {size:,} bytes, {MAX_CAPTION_BYTES:,} is the limit")
    return tuple(unique)


def read_fields(fields: Mapping[str, Any], names: Sequence[str] = CAPTION_FIELDS) -> list[str]:
    """Return all captions of a JSON object, in the fields of these names; it may have other fields too.

    Raises:
      UnusableClipError: a caption is neither a string nor a list of strings.
    """
    texts: list[str] = []
    for field in names:
        value = fields.get(field)
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str | None):
                raise UnusableClipError(f"its {field} is {type(text).__name__}, not text")
            texts += [text] if text is not None else []
    return texts


def read_file(name: str, content: bytes) -> list[str] | None:
    """Return the captions of a caption file; a text file is one caption, however many lines it has.

    Returns:
      None for a JSON object that has fields, but none of captions.

    Raises:
      UnusableClipError: the file is not UTF-8, or a `.json` file does not hold a JSON object.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableClipError(f"{name!r} is not UTF-8 ({error.reason} at byte {error.start})") from error
    if not name.lower().endswith(".json"):
        return [text]
    try:
        fields = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise UnusableClipError(f"{name!r} is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise UnusableClipError(f'{name!r} holds a {type(fields).__name__}; write {{"caption": "…"}}')
    return read_fields(fields) if not fields or any(field in fields for field in CAPTION_FIELDS) else None
