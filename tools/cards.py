"""Tabulate which cards sample and fine-tune a model, with the options that it takes.

    python tools/cards.py Wan2.1-T2V-1.3B-Diffusers Wan2.1-T2V-14B-Diffusers --json cards.json

Each argument is a pipeline's folder, of which only the JSON files are read. Sampling is planned as by `tools/plan.py
FOLDER --of sampler --fit`, compiled for a TPU that stands for the card, as programs for GPUs cannot be compiled without
one; fine-tuning as by `tools/plan.py FOLDER --train`, counted for an NVIDIA GPU. A cell has the options for the largest
clip that fits, of which the fastest ones. Nothing is run. `pip install -e '.[tpu]'` is needed.
"""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # programs are only compiled

import tyro

from dit_video.core.command_line import parse_arguments
from dit_video.core.errors import script
from dit_video.core.files import read_json, write_json
from dit_video.core.offload import OFFLOADS
from dit_video.core.platform.chips import GB
from dit_video.experiment.recipes.finetune import FineTuningOptions, make_finetuning_experiment
from dit_video.nn import Remat
from dit_video.planning import Topology
from dit_video.planning.pipeline import fit_pipeline
from dit_video.planning.plan import plan_experiment

Task = Literal["sample", "lora", "full"]
TASKS = {"sample": "sample", "lora": "fine-tune, LoRA", "full": "fine-tune, all weights"}
SHORTER = (81, 49, 33, 17)
"""Numbers of frames that are tried where the model's own does not fit."""
_SAMPLER, _TRAINER = Topology.parse("v5p:2x2x1"), Topology.parse("h200:1")


class Cell(NamedTuple):
    """The plan of a task on a card: of the largest clip that fits, with the fastest options."""

    folder: str
    task: Task
    memory: int
    """Memory of the card in GB."""
    peak: float | None = None
    """Peak in GB; None if nothing fits."""
    frames: int | None = None
    """Number of frames of the clip; None for the model's own."""
    options: tuple[str, ...] = ()
    """Options that it takes, besides the number of frames."""

    @property
    def needs_nothing(self) -> bool:
        """Return True if the model's own clips fit without options."""
        return self.peak is not None and self.frames is None and not self.options

    def __str__(self) -> str:
        if self.peak is None:
            return "–"
        frames = [] if self.frames is None else [f"{self.frames} frames"]
        return "yes" if self.needs_nothing else ", ".join([*frames, *(f"`{option}`" for option in self.options)])


def main(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    json: Path,
    memories: tuple[int, ...] = (12, 24, 48, 80, 141),
) -> None:
    """Tabulate which cards sample and fine-tune a model, with the options that it takes.

    For example:

        python tools/cards.py Wan2.1-T2V-1.3B-Diffusers Wan2.1-T2V-14B-Diffusers --json cards.json
        python tools/cards.py LTX-Video-0.9.5 --json cards.json --memories 8 16 32

    Args:
      folders: Folders of pipelines in diffusers' layout.
      json: File of the results; those that it has are not computed again.
      memories: Memories of the cards in GB; with the smallest first the fewest plans are made.
    """
    cells = [Cell(**each | {"options": tuple(each["options"])}) for each in read_json(json)] if json.is_file() else []
    for folder, task, memory in itertools.product(folders, get_args(Task), memories):
        own = [each for each in cells if (each.folder, each.task) == (folder.name, task)]
        if not any(each.memory == memory for each in own):
            # Sampling is fastest without options, so that a larger card has nothing to add.
            smaller = (each for each in own if task == "sample" and each.memory < memory)
            easy = next((each for each in smaller if each.needs_nothing), None)
            cells.append(_plan_cell(folder, task, memory) if easy is None else easy._replace(memory=memory))
            print(f"{folder.name}, {task}, {memory} GB: {cells[-1]}", file=sys.stderr, flush=True)
            write_json(json, [each._asdict() for each in cells])
    print(format_table(cells, memories))


def _plan_cell(folder: Path, task: Task, memory: int) -> Cell:
    limit = dataclasses.replace(_TRAINER.chip, memory=memory * GB).usable_memory
    plans = _plan_sampling(folder, limit) if task == "sample" else _plan_training(folder, task)
    for frames, options, peak in plans:
        if peak is not None and peak <= limit:
            return Cell(folder.name, task, memory, round(peak / GB, 1), frames, options)
    return Cell(folder.name, task, memory)


_Plan = tuple[int | None, tuple[str, ...], int | None]
"""A number of frames, the options, and the peak in bytes, or None if they do not fit."""


def _plan_sampling(folder: Path, limit: int) -> Iterator[_Plan]:
    """Yield plans of sampling with the fastest offload that fits, of clips that become shorter."""
    limit = min(limit, _SAMPLER.chip.usable_memory)
    own = plan = fit_pipeline(folder, _SAMPLER, limit)
    names = {offload: name for name, offload in OFFLOADS.items()}
    for frames in (None, *(frames for frames in SHORTER if frames < own.size.t)):
        if frames is not None:
            plan = fit_pipeline(folder, _SAMPLER, limit, size=own.size._replace(t=frames))
        # What has no name on the command line moves less than `layers`, which therefore fits, too.
        options = () if plan.offload is None else (f"--offload {names.get(plan.offload, 'layers')}",)
        yield frames, options, plan.peak if plan.fits else None


def _plan_training(folder: Path, train: Literal["lora", "full"]) -> Iterator[_Plan]:
    """Yield plans of fine-tuning, of clips that become shorter and, for each, of options that become slower."""
    own = make_finetuning_experiment(folder, has_weights=False).data.max_frames
    remats: tuple[Remat, ...] = ("attention", "full")
    optimizers: tuple[Literal["adamw", "adafactor"], ...] = ("adamw",) if train == "lora" else ("adamw", "adafactor")
    lengths = (None, *(frames for frames in SHORTER if frames < own))
    for frames, optimizer, remat in itertools.product(lengths, optimizers, remats):
        options = FineTuningOptions(train=train, max_frames=frames, optimizer=optimizer, remat=remat)
        experiment = make_finetuning_experiment(folder, options, has_weights=False)
        plan = plan_experiment(experiment, _TRAINER, is_lowered=False)
        changed: dict[str, str] = {} if remat == "full" else {"remat": remat}
        changed |= {"optimizer": optimizer} if optimizer != "adamw" else {}
        yield frames, tuple(f"--{name} {value}" for name, value in changed.items()), plan.memory.peak


def format_table(cells: list[Cell], memories: tuple[int, ...]) -> str:
    """Return a table in Markdown, with a row for each model and task."""
    rows = dict.fromkeys((cell.folder, cell.task) for cell in cells)
    found = {(cell.folder, cell.task, cell.memory): str(cell) for cell in cells}
    lines = ["| model | task | " + " | ".join(f"{memory} GB" for memory in memories) + " |"]
    lines.append("|---" * (2 + len(memories)) + "|")
    for folder, task in rows:
        columns = [found.get((folder, task, memory), "") for memory in memories]
        lines.append(f"| {folder} | {TASKS[task]} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    script(parse_arguments)(main)
