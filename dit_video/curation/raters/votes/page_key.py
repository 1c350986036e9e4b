"""The key of a page of pairs: which system each anonymous side is of, and the right answers of its control questions.

The key lies next to the page and not in it, so that a rater who has the page cannot see the systems.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json

FORMAT = 1
"""Version of the files of keys and of votes."""
QUESTIONS: Mapping[str, str] = {"prompt": "Which one follows the prompt better?", "look": "Which one looks better?"}
"""Text of each question of a pair, by its name."""
TIE = "tie"
"""Answer that prefers neither side."""


@dataclass(frozen=True, kw_only=True)
class PageControl:
    """The control question of a pair whose right answer is known."""

    kind: str
    """Kind of the wrong side: `degraded`, a copy of worse quality, or `other_prompt`, a sample of another prompt."""
    question: str
    """Question whose answer is known; answers of the other one are not used."""
    right: str
    """Right answer: id of the side that is the system's sample."""


@dataclass(frozen=True, kw_only=True)
class PagePair:
    """Two samples of a prompt on a page."""

    name: str
    """Random id of the pair, which votes name."""
    item: int
    """Number of the prompt's samples, which all pairs of these samples have in common."""
    prompt: str
    """Prompt of both samples."""
    domain: str
    """Domain of the prompt."""
    sides: tuple[str, str]
    """Random ids of the sides, in random order, which answers name."""
    systems: tuple[str, str]
    """System of each side; the same twice for a control."""
    control: PageControl | None = None
    """Control question; None for a comparison of two systems."""


@dataclass(frozen=True, kw_only=True)
class PageKey:
    """The key of a page, read by `tools/side_by_side_results.py`."""

    page: str
    """Random id of the page, which its votes name."""
    systems: tuple[str, ...]
    """Names of the systems."""
    seed: int
    """Seed of the ids, the sides and the controls."""
    pairs: tuple[PagePair, ...]
    """All pairs of the page."""
    comparisons_per_rater: int | None = None
    """Number of comparisons of systems that a rater sees; None for all."""
    controls_per_rater: int | None = None
    """Number of control questions that a rater sees; None for all."""

    def write(self, path: str | Path) -> None:
        """Write the key as JSON."""
        write_json(path, {"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, path: str | Path) -> "PageKey":
        """Read a key that `write` wrote.

        Raises:
          MissingError: no file at `path`.
          UserError: the file is damaged, or no key.
        """
        document = read_json(path)
        if not isinstance(document, dict) or document.get("format") != FORMAT or "pairs" not in document:
            raise UserError(f"{path} is no key of a page: format {FORMAT} and pairs are missing. Use PAGE.key.json")
        try:
            pairs = tuple(_parse_pair(entry) for entry in document["pairs"])
            systems = tuple(document["systems"])
            counts = {name: document.get(name) for name in ("comparisons_per_rater", "controls_per_rater")}
            key = cls(page=document["page"], systems=systems, seed=document["seed"], pairs=pairs, **counts)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is a damaged key ({error!r}). Make the page again") from error
        if unknown := {system for pair in pairs for system in pair.systems} - set(systems):
            raise UserError(f"{path} is a damaged key: {min(unknown)} is none of its systems. Make the page again")
        return key


def _parse_pair(entry: Mapping[str, Any]) -> PagePair:
    first, second = entry["sides"]
    system, other = entry["systems"]
    control = None if entry["control"] is None else PageControl(**entry["control"])
    return PagePair(**{**entry, "sides": (first, second), "systems": (system, other), "control": control})
