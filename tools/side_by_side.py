"""Make a page on which people compare samples side by side, or the list of prompts to sample for it."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

from pathlib import Path
from typing import Annotated

import tyro

from dit_video.core.command_line import check_minimum, parse_arguments, parse_size
from dit_video.core.errors import UserError, script
from dit_video.core.files import write_json
from dit_video.curation.raters import (
    PageOptions,
    PromptDomains,
    get_key_path,
    load_default_prompt_domains,
    name_systems,
    read_prompt_domains,
    write_page,
)


def main(
    samples: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SAMPLES")] = (),
    out: Path | None = None,
    names: tuple[str, ...] = (),
    seed: int = 0,
    controls: float = 0.05,
    control_sets: int = 3,
    pairs_per_rater: int | None = None,
    title: str = PageOptions().title,
    domains: Path | None = None,
    prompts_out: Path | None = None,
    prompts_per_domain: int = 5,
    size: str | None = None,
) -> None:
    """Make a page on which people compare samples side by side, or the list of prompts to sample for it.

    For example:

        python tools/side_by_side.py --prompts-out prompts.json --prompts-per-domain 5 --size 17x32x48
        python tools/side_by_side.py samples/run samples/other --out comparison --pairs-per-rater 40

    experiments/sample.py --prompts samples the list for each system; tools/side_by_side_results.py reads the votes.
    Raters open comparison/index.html, which needs no server, and send back the file of votes that it exports. The key
    comparison.key.json stays with whoever computes the results.

    Args:
        samples: Folders of samples, one for each system, each with prompts.json.
        out: Folder of the page to write; its key is written next to it.
        names: Names of the systems in the results; the folders' names by default.
        seed: Seed of ids, sides, controls and prompts.
        controls: Number of a rater's control questions as a share of the comparisons.
        control_sets: Number of control questions on the page, as a multiple of those that are drawn for each rater.
        pairs_per_rater: Number of comparisons that each rater sees, drawn by the rater's name; all by default.
        title: Heading of the page, which must not name the systems.
        domains: JSON file with domains of prompts (name, templates, subjects, scenes); 21 domains by default.
        prompts_out: JSON file to write a list of prompts to, for experiments/sample.py --prompts.
        prompts_per_domain: Number of prompts of each domain in that list.
        size: Number of frames, height and width of the prompts in that list; the training size by default.
    """
    check_minimum(1, prompts_per_domain=prompts_per_domain)
    check_minimum(0, seed=seed)
    chosen = load_default_prompt_domains() if domains is None else read_prompt_domains(domains)
    if prompts_out is None and out is None:
        raise UserError(
            "--out is missing. Use SAMPLES SAMPLES --out PAGE, or --prompts-out FILE for a list of prompts."
        )
    if prompts_out is not None:
        write_prompts(prompts_out, chosen, count=prompts_per_domain, seed=seed, size=size)
    if out is not None:
        options = PageOptions(
            title=title, seed=seed, controls=controls, control_sets=control_sets, pairs_per_rater=pairs_per_rater
        )
        key = write_page(name_systems(samples, names), out, options=options, domains=chosen)
        number = sum(pair.control is not None for pair in key.pairs)
        print(f"{out / 'index.html'}: {len(key.pairs)} pairs, {number} of them controls; key {get_key_path(out)}")
        print(f"each rater sees {key.comparisons_per_rater} comparisons and {key.controls_per_rater} controls")
    elif samples:
        raise UserError("--out is missing: the samples are compared on a page. Use --out PAGE.")


def write_prompts(path: Path, domains: PromptDomains, *, count: int, seed: int, size: str | None) -> None:
    """Write `count` prompts of each domain as requests, each with a seed of its own."""
    grid = {} if size is None else parse_size(size)._asdict()
    fields = dict(zip(("frames", "height", "width"), grid.values(), strict=True)) if grid else {}
    prompts = domains.make_prompts(count, seed=seed)
    write_json(path, [{"prompt": prompt, **fields, "seed": number} for number, prompt in enumerate(prompts)])
    print(f"{path}: {len(prompts)} prompts of {len(domains.domains)} domains")


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
