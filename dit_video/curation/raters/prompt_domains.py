"""Domains of prompts for evaluations by people, and the prompts of each by template."""

import functools
import importlib.resources
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from dit_video.core import config_json, rng
from dit_video.core.errors import UserError
from dit_video.core.files import read_json

OTHER = "other"
"""Domain of prompts that no domain of a config has."""


@dataclass(frozen=True, kw_only=True)
class PromptDomain:
    """A domain of prompts: every template with every subject and scene.

    Raises:
      UserError: If the name is reserved, or a template has other slots or none of the words for one.
    """

    name: str
    """Name of the domain in results."""
    templates: tuple[str, ...]
    """Texts with the slots {subject} and {scene}."""
    subjects: tuple[str, ...] = ()
    """Words for the slot {subject}."""
    scenes: tuple[str, ...] = ()
    """Words for the slot {scene}."""

    def __post_init__(self):
        if self.name in (OTHER, "overall", "") or not self.templates:
            rule = f"a domain has templates, and a name other than {OTHER} and overall"
            raise UserError(f"name={self.name!r} is invalid: {rule}. Use such a name, and a template.")
        known = {slot for slot, words in (("subject", self.subjects), ("scene", self.scenes)) if words}
        for template in self.templates:
            try:
                slots = {slot for _, slot, _, _ in Formatter().parse(template) if slot is not None}
            except ValueError as error:
                raise UserError(
                    f"templates={template!r} is invalid: {error}. Use slots such as {{subject}}."
                ) from error
            if slots - known:
                rule = f"slots are {{subject}} and {{scene}}, and {self.name} has words for them"
                raise UserError(f"templates={template!r} is invalid: {rule}. Use one of them, and list its words.")

    def list_prompts(self) -> list[str]:
        """Return all prompts without repetition: by template, then by subject, then by scene."""
        prompts = (
            template.format(subject=subject, scene=scene)
            for template in self.templates
            for subject in self.subjects or ("",)
            for scene in self.scenes or ("",)
        )
        return list(dict.fromkeys(prompts))


@dataclass(frozen=True, kw_only=True)
class PromptDomains:
    """The domains of an evaluation.

    Raises:
      UserError: If two domains have one name or one prompt.
    """

    domains: tuple[PromptDomain, ...]
    """Domains in the order of results."""

    def __post_init__(self):
        names = Counter(domain.name for domain in self.domains)
        if repeated := [name for name, count in names.items() if count > 1]:
            raise UserError(f"domains={repeated} is invalid: names differ. Use one domain with all templates.")
        texts = Counter(_normalize(prompt) for domain in self.domains for prompt in domain.list_prompts())
        if repeated := [text for text, count in texts.items() if count > 1]:
            raise UserError(f"domains={repeated[:1]} is invalid: a prompt is of one domain. Use other words for it.")

    def make_prompts(self, count: int, *, seed: int = 0) -> list[str]:
        """Return `count` prompts of every domain, drawn without repetition by the seed, domain by domain.

        Raises:
          UserError: If a domain has fewer prompts.
        """
        prompts = []
        for number, domain in enumerate(self.domains):
            texts = domain.list_prompts()
            if not 1 <= count <= len(texts):
                rule = f"domain {domain.name} has {len(texts)} prompts"
                raise UserError(f"count={count} is invalid: {rule}. Use count={len(texts)}, or 1 or more and less.")
            order = rng.make_generator(seed, "prompts of domains", number).permutation(len(texts))
            prompts += [texts[index] for index in order[:count].tolist()]
        return prompts

    def find_domain(self, prompt: str) -> str:
        """Return the domain of a prompt, regardless of case and spaces; `other` if no domain has it."""
        return self._names.get(_normalize(prompt), OTHER)

    @functools.cached_property
    def _names(self) -> Mapping[str, str]:
        return {_normalize(prompt): domain.name for domain in self.domains for prompt in domain.list_prompts()}


def _normalize(prompt: str) -> str:
    return re.sub(r"\s+", " ", prompt).strip().casefold()


def read_prompt_domains(path: str | Path) -> PromptDomains:
    """Read domains from a JSON list of objects with the fields of `PromptDomain`.

    Raises:
      MissingError: If there is no file at `path`.
      UserError: If the file is not such a list.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} must be a JSON list of domains, each with name and templates")
    kind = f"{PromptDomain.__module__}:{PromptDomain.__qualname__}"
    try:
        return PromptDomains(domains=tuple(config_json.from_json({**entry, "type": kind}) for entry in entries))
    except UserError as error:
        raise UserError(f"{path}: {error}. A domain has a name, templates, subjects and scenes.") from error


@functools.cache
def load_default_prompt_domains() -> PromptDomains:
    """Return 21 domains about what people film and imagine; each has 105 prompts or more."""
    with importlib.resources.as_file(importlib.resources.files(__package__)) as folder:
        return read_prompt_domains(folder / "default_prompt_domains.json")
