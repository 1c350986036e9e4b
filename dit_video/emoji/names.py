"""Names of emoji by the code points in the names of their files, with their parts, in several languages.

The names are those of Unicode's CLDR in the package `emoji`. A name has a tone of skin ("woman firefighter: medium skin
tone"), a person and a role ("woman", "firefighter"), each if there is one: these are what a model composes.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from dit_video.core import rng
from dit_video.core.errors import UserError

LANGUAGES = ("en", "ar", "de", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")
"""Languages that the package has."""
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
"""Tones of skin (Fitzpatrick's types 1–2 to 6) as in names."""
HELD_OUT_SHARE = 0.1
"""Share of the pairs of an emoji and a tone, and of those of a person and a role, that are held out."""
_TONE = re.compile(rf"_({'|'.join(TONES)})_skin_tone")
_PERSON = re.compile(r"(man|woman|person|men|women|people)_(.+)")
_SINGULAR = {"men": "man", "women": "woman", "people": "person"}
_PRESENTATION = "\ufe0f"
"""The variation selector, which files and names use differently."""


class EmojiName(NamedTuple):
    """The name of an emoji, and its parts."""

    base: str
    """The name without a tone, such as "woman firefighter"."""
    tone: str = ""
    """The tone of skin, one of `TONES`; empty if there is none."""
    person: str = ""
    """"man", "woman" or "person" if the set has another person with the same role; else empty."""
    role: str = ""
    """What the person does or has, such as "firefighter"; empty if there is no person."""
    translations: Mapping[str, str] = {}
    """The whole name in each language but English."""

    @property
    def text(self) -> str:
        """Return the whole name in English, as CLDR writes it: "woman firefighter: medium skin tone"."""
        return f"{self.base}: {self.tone} skin tone" if self.tone else self.base


class NamedFiles(NamedTuple):
    """The names of files, by their stems."""

    names: dict[str, EmojiName]
    unknown: tuple[str, ...]
    """Stems that the package has no name for."""


def read_names(stems: Iterable[str]) -> NamedFiles:
    """Return the names of files whose stems are code points in hexadecimal, such as `1f469-1f3fd-200d-1f692`.

    Raises:
      UserError: If the package `emoji` is not installed.
    """
    try:
        import emoji
    except ImportError as error:
        raise UserError("the names of emoji need a package that is not installed: pip install emoji") from error
    for language in LANGUAGES:
        emoji.config.load_language(language)
    known = {characters.replace(_PRESENTATION, ""): entry for characters, entry in emoji.EMOJI_DATA.items()}
    entries = {stem: known.get(_decode_stem(stem)) for stem in stems}
    found = {stem: entry for stem, entry in entries.items() if entry is not None}
    words = {stem: entry["en"].strip(":") for stem, entry in found.items()}
    persons = _find_persons(_TONE.sub("", word) for word in words.values())
    names = {}
    for stem, word in words.items():
        base, tone = _TONE.sub("", word), _TONE.search(word)
        person, role = persons.get(base, ("", ""))
        translations = {language: _to_text(found[stem][language]) for language in LANGUAGES[1:]}
        names[stem] = EmojiName(_to_text(base), tone[1] if tone else "", person, _to_text(role), translations)
    return NamedFiles(names, tuple(stem for stem in entries if stem not in found))


def choose_held_out(names: Mapping[str, EmojiName], seed: int) -> dict[str, str]:
    """Return the stems that are held out, each with the kind of pair that no other clip has: "tone" or "person".

    Of each kind a tenth of all pairs is held out, whole. The parts of a pair are each in other clips, as an emoji keeps
    two of its tones, and a role one of its persons.
    """
    toned, roles = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for name in names.values():
        if name.tone:
            toned[name.base].add(name.tone)
        if name.role:
            roles[name.role].add(name.person)
    tones = _draw_pairs(toned, 2, rng.make_generator(seed, "held out tones"))
    persons = _draw_pairs(roles, 1, rng.make_generator(seed, "held out persons"))
    kinds = {}
    for stem, name in names.items():
        if (name.role, name.person) in persons:
            kinds[stem] = "person"
        elif (name.base, name.tone) in tones:
            kinds[stem] = "tone"
    return kinds


def _draw_pairs(groups: Mapping[str, set[str]], kept: int, generator: np.random.Generator) -> set[tuple[str, str]]:
    """Return a share of the pairs of a group's name and a member, so that each group keeps so many members."""
    pairs = [(group, member) for group in sorted(groups) for member in sorted(groups[group])]
    drawn, left = set[tuple[str, str]](), {group: len(members) for group, members in groups.items()}
    for number in generator.permutation(len(pairs)).tolist():
        group, _ = pair = pairs[number]
        if len(drawn) == round(HELD_OUT_SHARE * len(pairs)):
            break
        if left[group] > kept:
            left[group] -= 1
            drawn.add(pair)
    return drawn


def _decode_stem(stem: str) -> str:
    """Return the characters of a stem without the variation selector; empty if it is no list of code points."""
    try:
        return "".join(chr(int(code, 16)) for code in stem.split("-")).replace(_PRESENTATION, "")
    except (ValueError, OverflowError):
        return ""


def _find_persons(bases: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return the person and the role of each name that has another person beside it, as one word with underscores.

    A role without a person, such as "firefighter", is a person's beside "woman firefighter".
    """
    bases = set(bases)
    split: dict[str, tuple[str, str]] = {}
    for base in bases:
        if match := _PERSON.fullmatch(base):
            split[base] = (_SINGULAR.get(match[1], match[1]), match[2])
    neutral = {role: ("person", role) for _, role in split.values() if role in bases}
    split |= neutral
    counts = defaultdict[str, set[str]](set)
    for person, role in split.values():
        counts[role].add(person)
    return {base: pair for base, pair in split.items() if len(counts[pair[1]]) > 1}


def _to_text(name: str) -> str:
    return name.strip(":").replace("_", " ")
