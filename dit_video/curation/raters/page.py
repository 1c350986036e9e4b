"""The page: pairs of samples under random names, and its key in a file of its own."""

import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_video.apps.reports.template import render_template
from dit_video.core import rng
from dit_video.core.errors import UserError, check_at_least
from dit_video.core.files import atomic_path, write_text
from dit_video.curation.raters.default_prompt_domains import DEFAULT_PROMPT_DOMAINS
from dit_video.curation.raters.media import copy_sample, write_degraded
from dit_video.curation.raters.prompt_domains import PromptDomains
from dit_video.curation.raters.sample_sets import PromptSamples, read_sample_sets
from dit_video.curation.raters.votes.page_key import FORMAT, QUESTIONS, TIE, PageControl, PageKey, PagePair

PAGE, MEDIA_FOLDER = "index.html", "media"


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Options of a page.

    Raises:
      UserError: a negative seed, a share that is negative or 1/2 or more, or a number below 1.
    """

    title: str = "Which one is better?"
    """Heading of the page; it must not name the systems."""
    seed: int = 0
    """Seed of the ids, the sides and the controls, and of what each rater sees."""
    controls: float | int = 0.05
    """Number of a rater's control questions as a share of the comparisons of systems; at least one if it is above 0."""
    control_sets: int = 3
    """Number of control questions on the page, from which each rater's are drawn, as a multiple of a rater's."""
    pairs_per_rater: int | None = None
    """Number of comparisons of systems that each rater sees, drawn by the rater's name; None for all."""

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"seed={self.seed} is invalid: it must be 0 or more. Use seed=0.")
        if not 0 <= self.controls < 0.5:
            rule = "most pairs must compare systems"
            raise UserError(f"controls={self.controls} is invalid: {rule}. Use a share from 0 to less than 0.5.")
        check_at_least(1, control_sets=self.control_sets, pairs_per_rater=self.pairs_per_rater)


class _Side(NamedTuple):
    """A side of a pair before it has an id."""

    system: str
    source: Path
    is_degraded: bool = False


class _Draft(NamedTuple):
    """A pair before it has ids; of a control the first side is right."""

    item: int
    sides: tuple[_Side, _Side]
    control: str = ""


def get_key_path(out: str | Path) -> Path:
    """Return the path of a page's key, next to the page: `PAGE.key.json`."""
    out = Path(out)
    return out.with_name(f"{out.name}.key.json")


def write_page(
    folders: Mapping[str, Path],
    out: str | Path,
    *,
    options: PageOptions | None = None,
    domains: PromptDomains = DEFAULT_PROMPT_DOMAINS,
    progress: Callable[[int, int], None] | None = None,
) -> PageKey:
    """Write the page of all pairs of systems on all prompts into a folder, and its key next to it; return the key.

    Names of files, and everything in the page, are random ids, drawn by the seed; files hold pixels alone. By the
    rater's name the page draws the pairs that the rater sees, orders them and places their sides: each comparison is as
    likely as any other, and pairs of systems are equally frequent. It needs no server and no network.

    Args:
      folders: folder of each system's samples, by the system's name.
      out: folder to write; it must not exist, since votes on an older page need that page's key.
      options: seed, share of controls and heading.
      domains: config in which the domains of prompts are looked up.
      progress: called with the number of finished pairs and of all.

    Raises:
      MissingError: no `prompts.json`, or no file of a sample.
      UserError: the page or its key exists, the prompts of the systems do not match, or there are fewer comparisons
        than each rater is to see.
    """
    options, out = options or PageOptions(), Path(out).absolute()
    for path in (out, get_key_path(out)):
        if path.exists():
            rule = "it exists, and votes on another page may need it"
            raise UserError(f"out={path} is invalid: {rule}. Use another folder, or remove the page and its key.")
    sets = read_sample_sets(folders)
    drafts = _draft_comparisons(sets, [*folders])
    comparisons = len(drafts) if options.pairs_per_rater is None else options.pairs_per_rater
    if comparisons > len(drafts):
        rule = f"the page has {len(drafts)} comparisons"
        raise UserError(f"pairs_per_rater={comparisons} is invalid: {rule}. Use at most {len(drafts)}.")
    controls = math.ceil(options.controls * comparisons)
    drafts += _draft_controls(sets, [*folders], options, count=controls, domains=domains)
    # Ids depend on the samples, too: two pages of one seed have none in common.
    content = zlib.crc32(repr([(*folders,), sets]).encode())
    generator = rng.make_generator(options.seed, "side by side", content)
    order = generator.permutation(len(drafts)).tolist()
    pairs: list[PagePair] = []
    files: list[tuple[str, str]] = []
    with atomic_path(out) as temporary:
        (temporary / MEDIA_FOLDER).mkdir(parents=True)
        for draft in (drafts[index] for index in order):
            pair, names = _make_pair(draft, sets[draft.item].prompt, domains, generator)
            _write_sides(draft, names, temporary / MEDIA_FOLDER, seed=options.seed)
            pairs.append(pair)
            by_side = {Path(name).stem: name for name in names}
            files.append((by_side[pair.sides[0]], by_side[pair.sides[1]]))
            if progress is not None:
                progress(len(pairs), len(drafts))
        key = PageKey(
            page=_draw_id(generator),
            systems=(*folders,),
            seed=options.seed,
            pairs=tuple(pairs),
            comparisons_per_rater=comparisons,
            controls_per_rater=controls,
        )
        write_text(temporary / PAGE, render_page(key, files, title=options.title))
        key.write(get_key_path(out))
    return key


def render_page(key: PageKey, files: Sequence[tuple[str, str]], *, title: str) -> str:
    """Return the page as HTML, with what raters may know of the key: no systems or domains, nor what a control is.

    Args:
      key: the page's key.
      files: names of the files of each pair's sides.
      title: heading.
    """
    data: dict[str, Any] = {
        "format": FORMAT,
        "page": key.page,
        "tie": TIE,
        "questions": [{"name": name, "text": text} for name, text in QUESTIONS.items()],
        "pairs": [
            {
                "name": pair.name,
                "prompt": pair.prompt,
                "sides": [
                    {"name": side, "file": f"{MEDIA_FOLDER}/{file}"}
                    for side, file in zip(pair.sides, names, strict=True)
                ],
            }
            for pair, names in zip(key.pairs, files, strict=True)
        ],
        "draws": _list_draws(key),
    }
    return render_template("side_by_side.html.jinja", title=title, data=data, questions=QUESTIONS)


def _list_draws(key: PageKey) -> list[dict[str, Any]]:
    """Return the numbers of pairs that a rater sees, of comparisons and of controls, and the pairs' numbers by stratum.

    Strata are the pairs of systems and the kinds of controls, of which a rater sees equal shares.
    """
    draws = []
    for is_control, count in ((False, key.comparisons_per_rater), (True, key.controls_per_rater)):
        strata: dict[str | frozenset[str], list[int]] = {}
        for number, pair in enumerate(key.pairs):
            if (pair.control is not None) == is_control:
                stratum = frozenset(pair.systems) if pair.control is None else pair.control.kind
                strata.setdefault(stratum, []).append(number)
        total = sum(map(len, strata.values()))
        if total:
            draws.append({"count": total if count is None else count, "strata": [*strata.values()]})
    return draws


def _draft_comparisons(sets: Sequence[PromptSamples], systems: Sequence[str]) -> list[_Draft]:
    """Return all pairs of systems on all prompts."""
    return [
        _Draft(item, (_Side(first, each.files[first]), _Side(second, each.files[second])))
        for item, each in enumerate(sets)
        for first, second in itertools.combinations(systems, 2)
    ]


def _draft_controls(
    sets: Sequence[PromptSamples], systems: Sequence[str], options: PageOptions, *, count: int, domains: PromptDomains
) -> list[_Draft]:
    """Return control pairs, by turns with a degraded copy and with a sample of another prompt, if there is one.

    Args:
      sets: samples of each prompt.
      systems: names of the systems.
      options: seed, and the number of sets of controls; there are fewer if they would repeat.
      count: number of controls that a rater sees.
      domains: config in which the domains of prompts are looked up.
    """
    generator = rng.make_generator(options.seed, "controls")
    drafts: list[_Draft] = []
    order = generator.permutation(len(sets) * len(systems)).tolist()
    for number in range(max(count, min(options.control_sets * count, 2 * len(order)))):
        turn, place = divmod(number, len(order))
        item, system_number = divmod(order[place], len(systems))
        system = systems[system_number]
        others = _list_other_prompts(sets, item, domains)
        right = _Side(system, sets[item].files[system])
        if (place + turn) % 2 and others:
            wrong = _Side(system, sets[others[int(generator.integers(len(others)))]].files[system])
            drafts.append(_Draft(item, (right, wrong), "other_prompt"))
        else:
            drafts.append(_Draft(item, (right, right._replace(is_degraded=True)), "degraded"))
    return drafts


def _list_other_prompts(sets: Sequence[PromptSamples], item: int, domains: PromptDomains) -> list[int]:
    """Return the items of other prompts, if possible of another domain, so that the sample clearly does not follow."""
    others = [number for number, each in enumerate(sets) if each.prompt != sets[item].prompt]
    domain = domains.find_domain(sets[item].prompt)
    return [number for number in others if domains.find_domain(sets[number].prompt) != domain] or others


def _make_pair(
    draft: _Draft, prompt: str, domains: PromptDomains, generator: np.random.Generator
) -> tuple[PagePair, list[str]]:
    """Return the pair with its ids, its sides in random order, and the file names of the draft's sides."""
    ids = [_draw_id(generator), _draw_id(generator)]
    first = int(generator.integers(2))
    order = (first, 1 - first)
    control = None
    if draft.control:
        question = "look" if draft.control == "degraded" else "prompt"
        control = PageControl(kind=draft.control, question=question, right=ids[0])
    pair = PagePair(
        name=_draw_id(generator),
        item=draft.item,
        prompt=prompt,
        domain=domains.find_domain(prompt),
        sides=(ids[order[0]], ids[order[1]]),
        systems=(draft.sides[order[0]].system, draft.sides[order[1]].system),
        control=control,
    )
    names = [f"{name}{side.source.suffix.lower()}" for name, side in zip(ids, draft.sides, strict=True)]
    return pair, names


def _write_sides(draft: _Draft, names: Sequence[str], folder: Path, *, seed: int) -> None:
    for side, name in zip(draft.sides, names, strict=True):
        if side.is_degraded:
            write_degraded(side.source, folder / name, seed=seed)
        else:
            copy_sample(side.source, folder / name)


def _draw_id(generator: np.random.Generator) -> str:
    return generator.bytes(8).hex()
