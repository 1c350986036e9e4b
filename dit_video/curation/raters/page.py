"""The page: pairs of samples under random names, and its key in a file of its own."""

import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core import rng
from dit_video.core.errors import UserError, check_at_least
from dit_video.core.files import atomic_path, write_text
from dit_video.core.templates import make_environment
from dit_video.curation.raters.prompt_domains import PromptDomains, load_default_prompt_domains
from dit_video.curation.raters.samples import PromptSamples, copy_sample, degrade, read_sample_sets
from dit_video.curation.raters.votes import FORMAT, QUESTIONS, TIE, PageControl, PageKey, PagePair
from dit_video.video import decode

PAGE, MEDIA_FOLDER = "index.html", "media"


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Options of a page.

    Raises:
      UserError: If the seed is negative, the share is negative or 1/2 or more, or a number is below 1.
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


class _Draft(NamedTuple):
    """A pair before it has ids; of a control the first side is right, and both are of one system."""

    item: int
    systems: tuple[str, str]
    sources: tuple[Path, Path]
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
    domains: PromptDomains | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PageKey:
    """Write the page of all pairs of systems on all prompts into a folder, and its key next to it; return the key.

    Names of files, and everything in the page, are random ids, drawn by the seed; files hold pixels alone. By the
    rater's name the page draws the pairs that the rater sees, orders them and places their sides: each comparison is as
    likely as any other, and pairs of systems are equally frequent. It needs no server and no network.

    Args:
      folders: Folder of each system's samples, by the system's name.
      out: Folder to write; it must not exist, since votes on an older page need that page's key.
      options: Seed, share of controls and heading.
      domains: Domains of prompts; the default ones if None.
      progress: Called with the number of finished pairs and of all.

    Raises:
      MissingError: If a folder has no `prompts.json`, or a sample's file does not exist.
      UserError: If the page or its key exists, the prompts of the systems do not match, or there are fewer comparisons
        than each rater is to see.
    """
    options, domains, out = options or PageOptions(), domains or load_default_prompt_domains(), Path(out).absolute()
    for path in (out, get_key_path(out)):
        if path.exists():
            rule = "it exists, and votes on another page may need it"
            raise UserError(f"out={path} is invalid: {rule}. Use another folder, or remove the page and its key.")
    sets = read_sample_sets(folders)
    drafts = [
        _Draft(item, pair, (each.files[pair[0]], each.files[pair[1]]))
        for item, each in enumerate(sets)
        for pair in itertools.combinations(folders, 2)
    ]
    comparisons = len(drafts) if options.pairs_per_rater is None else options.pairs_per_rater
    if comparisons > len(drafts):
        rule = f"the page has {len(drafts)} comparisons"
        raise UserError(f"pairs_per_rater={comparisons} is invalid: {rule}. Use at most {len(drafts)}.")
    controls = math.ceil(options.controls * comparisons)
    drafts += _draft_controls(sets, [*folders], options, count=controls, domains=domains)
    # Ids depend on the samples, too: two pages of one seed have none in common.
    generator = rng.make_generator(options.seed, "side by side", zlib.crc32(repr([(*folders,), sets]).encode()))
    pairs: list[PagePair] = []
    files: dict[str, str] = {}
    with atomic_path(out) as temporary:
        (temporary / MEDIA_FOLDER).mkdir(parents=True)
        for index in generator.permutation(len(drafts)).tolist():
            draft = drafts[index]
            name, *ids = (generator.bytes(8).hex() for _ in range(3))
            for side, source in zip(ids, draft.sources, strict=True):
                files[side] = f"{MEDIA_FOLDER}/{side}{source.suffix.lower()}"
                if draft.control == "degraded" and side == ids[1]:
                    degrade(decode(source), seed=options.seed).save(temporary / files[side])
                else:
                    copy_sample(source, temporary / files[side])
            first, second = generator.permutation(2).tolist()
            question = "look" if draft.control == "degraded" else "prompt"
            pair = PagePair(
                name=name,
                item=draft.item,
                prompt=sets[draft.item].prompt,
                domain=domains.find_domain(sets[draft.item].prompt),
                sides=(ids[first], ids[second]),
                systems=(draft.systems[first], draft.systems[second]),
                control=PageControl(kind=draft.control, question=question, right=ids[0]) if draft.control else None,
            )
            pairs.append(pair)
            progress(len(pairs), len(drafts))
        key = PageKey(
            page=generator.bytes(8).hex(),
            systems=(*folders,),
            seed=options.seed,
            pairs=tuple(pairs),
            comparisons_per_rater=comparisons,
            controls_per_rater=controls,
        )
        write_text(temporary / PAGE, _render_page(key, files, options.title))
        key.write(get_key_path(out))
    return key


def _draft_controls(
    sets: Sequence[PromptSamples], systems: Sequence[str], options: PageOptions, *, count: int, domains: PromptDomains
) -> list[_Draft]:
    """Return control pairs, by turns with a degraded copy and with a sample of another prompt, if there is one.

    Args:
      sets: Samples of each prompt.
      systems: Names of the systems.
      options: Seed, and the number of sets of controls; there are fewer if they would repeat.
      count: Number of controls that a rater sees.
      domains: Domains of prompts: the other prompt is of another one if possible, so that it clearly does not follow.
    """
    generator = rng.make_generator(options.seed, "controls")
    drafts: list[_Draft] = []
    order = generator.permutation(len(sets) * len(systems)).tolist()
    for number in range(max(count, min(options.control_sets * count, 2 * len(order)))):
        turn, place = divmod(number, len(order))
        item, system_number = divmod(order[place], len(systems))
        system, prompt = systems[system_number], sets[item].prompt
        others = [each for each in sets if each.prompt != prompt]
        others = [each for each in others if domains.find_domain(each.prompt) != domains.find_domain(prompt)] or others
        right = wrong = sets[item].files[system]
        control = "degraded"
        if (place + turn) % 2 and others:
            control, wrong = "other_prompt", others[int(generator.integers(len(others)))].files[system]
        drafts.append(_Draft(item, (system, system), (right, wrong), control))
    return drafts


def _render_page(key: PageKey, files: Mapping[str, str], title: str) -> str:
    """Return the page as HTML, with what raters may know of the key: no systems or domains, nor what a control is."""
    data: dict[str, Any] = {
        "format": FORMAT,
        "page": key.page,
        "tie": TIE,
        "questions": [{"name": name, "text": text} for name, text in QUESTIONS.items()],
        "pairs": [
            {
                "name": pair.name,
                "prompt": pair.prompt,
                "sides": [{"name": side, "file": files[side]} for side in pair.sides],
            }
            for pair in key.pairs
        ],
        "draws": _list_draws(key),
    }
    template = make_environment("dit_video.curation.raters").get_template("side_by_side.html.jinja")
    return template.render(title=title, data=data, questions=QUESTIONS)


def _list_draws(key: PageKey) -> list[dict[str, Any]]:
    """Return the numbers of pairs that a rater sees, of comparisons and of controls, and the pairs' numbers by stratum.

    Strata are the pairs of systems and the kinds of controls; a rater sees equal shares of them.
    """
    draws = []
    for is_control, count in ((False, key.comparisons_per_rater), (True, key.controls_per_rater)):
        strata: dict[str | frozenset[str], list[int]] = {}
        for number, pair in enumerate(key.pairs):
            if (pair.control is not None) == is_control:
                stratum = frozenset(pair.systems) if pair.control is None else pair.control.kind
                strata.setdefault(stratum, []).append(number)
        if strata:
            draws.append({"count": count, "strata": [*strata.values()]})
    return draws
