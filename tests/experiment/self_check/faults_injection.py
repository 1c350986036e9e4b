"""The class of a silent fault, the catalogue of a layer, and how faults are put in their places."""

import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from experiment.self_check.variants import Sources

from dit_video.data.latents.cache import LatentExample, LatentSource
from dit_video.data.latents.writer import write_latents
from dit_video.experiment.run import Run

CHECKS = {
    "data": ("latents", "latent_statistics", "frames", "captions", "text_embeddings", "held_out", "rows", "order"),
    "model": (
        *("segment_isolation", "padding", "text_conditioning", "time_conditioning", "positions", "token_mixing"),
        *("frame_conditioning", "precision"),
    ),
    "objective": ("objective", "noise", "times", "caption_dropout", "loss_mean"),
    "step": ("gradient", "trained_parameters", "ema", "optimizer", "adapter", "initial_weights", "resume"),
}
"""Names of the checks of the self-check, by layer."""
Inject = Callable[[Run], None]
"""A function that puts a fault into the package or into the files of a run that is about to be trained."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A mistake after which training goes on, with a plausible loss, and its result is worse or wrong."""

    name: str
    layer: str
    """Layer of the catalogue: data, rows, model, objective or state."""
    variant: str
    """Variant of the training that the fault is injected into."""
    checks: frozenset[str]
    """Names of checks that tell a user where to look."""
    mistake: str
    """Description of the mistake, with a thread about one like it where there is one."""
    inject: Inject


class Catalogue(list[Fault]):
    """The faults of a layer, in order."""

    def __init__(self, layer: str):
        super().__init__()
        self._layer = layer

    def add(self, mistake: str, *checks: str, variant: str = "plain") -> Callable[[Inject], Inject]:
        """Return a decorator that adds the function that injects a fault, whose name is that of the fault."""
        if unknown := set(checks) - {name for names in CHECKS.values() for name in names}:
            raise ValueError(f"no check is named {', '.join(sorted(unknown))}")

        def register(inject: Inject) -> Inject:
            self.append(
                Fault(
                    name=inject.__name__,
                    layer=self._layer,
                    variant=variant,
                    checks=frozenset(checks),
                    mistake=mistake,
                    inject=inject,
                )
            )
            return inject

        return register


def replace_function(function: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Replace a function of the package in all modules that have imported it, as if its source had been edited."""
    count = 0
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "dit_video":
            for attribute in [each for each, value in vars(module).items() if value is function]:
                setattr(module, attribute, replacement)
                count += 1
    assert count, f"no module has {function}"


def replace_method(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method by what `make` returns for it."""
    setattr(owner, name, make(getattr(owner, name)))


def get_sources(run: Run) -> Sources:
    """Return the files that a run shares with others."""
    return Sources((run.folder / "data").resolve().parent)


def copy_data(run: Run) -> Path:
    """Return the data set of a run, which gets a copy of its own."""
    link = run.folder / "data"
    shared = link.resolve()
    link.unlink()
    shutil.copytree(shared, link)
    return link


def rewrite_latents(run: Run, change: Callable[[list[LatentExample]], Iterable[LatentExample]]) -> None:
    """Replace the cached latents of a run by changed ones, under the same identity."""
    folder = run.folder / "latents"
    source = LatentSource(folder)
    payloads = [key.split("\0")[1] for key in source.clip_keys.to_pylist()]
    examples = [
        LatentExample(name, tuple(captions), latents, clip, (), fields, payload)
        for name, captions, (latents, fields), clip, payload in zip(
            source.names,
            source.all_captions,
            map(source.read_example, range(len(source))),
            source.clips,
            payloads,
            strict=True,
        )
    ]
    changed = folder.with_name("changed latents")
    write_latents(changed, change(examples), identity=source.identity, fields=source.fields)
    shutil.rmtree(folder)
    changed.rename(folder)


def map_latents(run: Run, change: Callable[[Any], Any]) -> None:
    """Apply a function to the latents of each clip in the cache."""
    rewrite_latents(run, lambda examples: [each._replace(latents=change(each.latents)) for each in examples])


def permute_latents(run: Run, order: Callable[[int], Iterable[int]]) -> None:
    """Exchange latents among clips of one size; `order` returns the old number of each new one."""

    def change(examples: list[LatentExample]) -> list[LatentExample]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, example in enumerate(examples):
            groups.setdefault(example.latents.shape, []).append(number)
        changed = list(examples)
        for members in groups.values():
            for number, other in zip(members, order(len(members)), strict=True):
                changed[number] = examples[number]._replace(latents=examples[members[other]].latents)
        return changed

    rewrite_latents(run, change)


def encode_again(run: Run, *patches: tuple[Any, str, Any]) -> None:
    """Encode the clips of a run again, with attributes of modules or classes that are replaced only meanwhile."""
    shutil.rmtree(run.folder / "latents", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in patches:
            patch.setattr(owner, name, value)
        again = Run.open(run.folder)
        again.experiment.denoiser.encode_latents(again)
