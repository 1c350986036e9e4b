"""Replay steps of a run and compare them with its hash chain."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro

from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import MissingError, script
from dit_video.core.platform.compilation_cache import enable_compilation_cache
from dit_video.distributed.mesh import parse_parallelism
from dit_video.experiment.replay import Replay, replay, with_parallelism
from dit_video.experiment.run import Run
from dit_video.experiment.several_models import check_single
from dit_video.loading import find_folder
from dit_video.sampling.pipeline_config import RUN_CONFIG
from dit_video.training.hooks.logging import Progress


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    model: str = "denoiser",
    first: int | None = None,
    last: int | None = None,
    parallel: str | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
    cache: bool = True,
) -> None:
    """Replay steps of a run and compare each batch, loss and saved state with the run's hash chain.

    The result is `same bits`, `within 1e-6` on other devices than the run's, or `differs` with the first array that
    does; then the exit code is 1. Nothing is written. For example:

        python tools/verify.py runs/clips
        python tools/verify.py runs/clips --model autoencoder --first 0 --last 20
        python tools/verify.py gs://BUCKET/runs/clips --parallel data=1,fsdp=4 --json

    Args:
        run: Folder or address of a run, which may be in training.
        model: Name of the trained model: denoiser, autoencoder, or another stage's.
        first: Step of a checkpoint that is kept, or 0; the newest one before the last step by default.
        last: Last step to repeat; the newest one by default.
        parallel: Devices, such as data=1,fsdp=4, and perhaps context_attention=ring; the run's by default.
        json_: Print JSON instead of text.
        cache: Keep compiled programs in ~/.cache/dit_video/programs, so that the next start is faster.
    """
    check_minimum(0, first=first)
    check_minimum(1, last=last)
    if cache:
        enable_compilation_cache()
    folder = find_folder(run)
    if not (folder / RUN_CONFIG).is_file():
        raise MissingError(f"RUN={folder} is invalid: it has no {RUN_CONFIG}. Use the folder of a run.")
    opened = Run.open(folder)
    check_single(opened)
    if parallel is not None:
        opened = with_parallelism(opened, parse_parallelism(parallel, opened.experiment.parallel))
    with Progress("replaying", 1, unit="step") as progress:

        def update(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        replayed = replay(opened, model=model, first=first, last=last, progress=update)
    print(json.dumps({**asdict(replayed), "text": describe(replayed)}, indent=2) if json_ else describe(replayed))
    if replayed.result == "differs":
        sys.exit(1)


def describe(replayed: Replay) -> str:
    """Return a replay's result as lines of text."""
    states = f", and the saved states of steps {', '.join(map(str, replayed.compared_states))}"
    compared = f"batches and losses{states if replayed.compared_states else ''}"
    lines = [f"{replayed.model}, steps {replayed.first + 1} to {replayed.last}: {replayed.result} ({compared})"]
    if replayed.difference is not None:
        what = "first difference" if replayed.result == "differs" else "first difference, by rounding"
        lines.append(f"{what}: {replayed.difference}")
    for name, error in replayed.max_errors.items():
        if error:
            lines.append(f"largest relative difference of {name.replace('_', ' ')}: {error:.1e}")
    lines += [
        f"changed since: {change.path} is {change.old!r} there and {change.new!r} here" for change in replayed.changes
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
