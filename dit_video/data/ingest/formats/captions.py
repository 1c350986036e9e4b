"""Captions: what the formats write, and what of it is kept.

A caption is stripped of the white space around it; what is inside, line breaks too, stays as it is. An empty one is no
caption, and the same one twice is one. A caption that is too long or not UTF-8 sets its clip aside, with the reason: it
is rather a wrong file than a wrong word, and a clip that silently lost its caption would train the unconditional model.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dit_video.data.ingest.formats.listed import Unusable, quoted

LONGEST = 64 << 10
"""bytes of UTF-8; some 10,000 words"""
LARGEST_FILE = 16 << 20
"""bytes of a caption file: its JSON may hold far more than captions"""
FIELDS = ("text", "caption", "captions")
"""The columns and JSON fields that hold captions; each a string or, in JSON, a list of strings."""
FILES = (".txt", ".caption", ".json")
"""The suffixes of caption files, in the order in which a clip's captions are taken from several."""


def tidy(texts: Iterable[str]) -> tuple[str, ...]:
    """The captions that are kept.

    Raises:
      Unusable: one is too long, or holds what UTF-8 cannot (half of a surrogate pair).
    """
    kept = dict.fromkeys(text for text in map(str.strip, texts) if text)
    for text in kept:
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise Unusable("its caption is not UTF-8") from error
        if size > LONGEST:
            raise Unusable(f"its caption has {size:,} bytes, {LONGEST:,} is the limit")
    return tuple(kept)


def of_fields(fields: Mapping[str, Any]) -> list[str]:
    """All captions of a JSON object, which may have other fields too.

    Raises:
      Unusable: a caption is neither a string nor a list of strings.
    """
    texts: list[str] = []
    for field in FIELDS:
        value = fields.get(field)
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str | None):
                raise Unusable(f"its {field} is {type(text).__name__}, not text")
            texts += [text] if text is not None else []
    return texts


def of_file(name: str, content: bytes) -> list[str]:
    """The captions of a caption file: all of a text file is one caption, however many lines it has.

    Raises:
      Unusable: it is not UTF-8; a `.json` that is not a JSON object.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable(f"{quoted(name)} is not UTF-8 ({error.reason} at byte {error.start})") from error
    if not name.lower().endswith(".json"):
        return [text]
    try:
        fields = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{quoted(name)} is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise Unusable(f'{quoted(name)} holds a {type(fields).__name__}; write {{"caption": "…"}}')
    return of_fields(fields)
