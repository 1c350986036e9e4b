"""Sample clips from a run, a pipeline folder or a folder of open weights."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parent))  # for a caller in another folder, such as a test

from picture_options import PictureOptions
from sampling_options import SamplingOptions
from task_options import TaskName, TaskOptions

from dit_video.core.command_line import check_minimum, parse_arguments, parse_size
from dit_video.core.errors import UserError, script
from dit_video.evaluation.samples import write_samples
from dit_video.evaluation.task_results import write_task_results
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Request
from dit_video.sampling.request_file import read_requests
from dit_video.sampling.tasks.task_file import TaskEntry, read_tasks
from dit_video.training.hooks.logging import Progress
from dit_video.video.encode import FORMATS

_DEFAULTS, _NO_PICTURES, _NO_TASK = SamplingOptions(), PictureOptions(), TaskOptions()


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Path,
    prompt: str | None = None,
    prompts: Path | None = None,
    size: str | None = None,
    seed: int | None = None,
    negative: str | None = None,
    pictures: Annotated[PictureOptions, tyro.conf.arg(name="")] = _NO_PICTURES,
    task: TaskName | None = None,
    clips: Annotated[TaskOptions, tyro.conf.arg(name="")] = _NO_TASK,
    text_encoder: Path | None = None,
    options: Annotated[SamplingOptions, tyro.conf.arg(name="")] = _DEFAULTS,
) -> None:
    """Sample one prompt into a file, or a list of prompts into a folder; or run a task on one or several clips.

    For example:

        python experiments/sample.py experiments/pretrained/shapes --prompt "a red circle moving left" --out clip.mp4
        python experiments/sample.py RUN --prompt "…" --size 17x32x48 --seed 3 --steps 50 --guidance 3 --out clip.gif
        python experiments/sample.py RUN --prompt "…" --sampler unipc --steps 12 --rescale 0.7 --out clip.mp4
        python experiments/sample.py RUN --prompts prompts.json --out samples/
        python experiments/sample.py Wan2.1-I2V-14B-480P-Diffusers --prompt "…" --image first.png --out clip.mp4
        python experiments/sample.py RUN --prompt "…" --conditions first.png@0 middle.png@40@0.8 --out clip.mp4
        python experiments/sample.py RUN --task extend --clip clip.mp4 --new-frames 16 --prompt "…" --out extended/
        python experiments/sample.py RUN --task inpaint --prompts clips.json --out inpainted/

    Args:
        run: Folder of a run, a pipeline or open weights.
        out: File to write with --prompt (mp4, mov, webm, gif, webp, apng; png or jpg for one frame), or folder
            to write with --prompts.
        prompt: Description of the clip.
        prompts: JSON file with a list of {prompt, frames, height, width, seed, image, …}; see docs/evaluation.md.
        size: Number of frames, height and width, such as 17x32x48; the training size by default.
        seed: Seed of the noise; 0 by default.
        negative: Negative prompt, which guidance steers away from; the model's own by default, none if "".
        pictures: Images and clips that the clip keeps or follows, in models that accept them.
        task: Task on clips, whose results are written to the folder --out with a contact sheet and samples.jsonl;
            without it clips are made from prompts and pictures.
        clips: Clips and values of the task.
        text_encoder: Folder of the model's frozen text encoder, if it has been moved.
        options: Weights and sampling.
    """
    if task is not None:
        entries = _make_entries(task, prompt, prompts, size, seed, pictures, clips)
        _run_tasks(entries, out, options.load_pipeline(run, text_encoder=text_encoder), options, pictures, negative)
        return
    if clips != _NO_TASK:
        raise UserError("--clip and other options of tasks need --task; use --task extend or another one")
    if (prompt is None) == (prompts is None):
        raise UserError("exactly one of --prompt and --prompts is needed; use --prompt TEXT or --prompts FILE")
    check_minimum(0, seed=seed)
    start_time = time.perf_counter()
    if prompts is not None:
        if any(option is not None for option in (size, seed, negative)) or pictures != _NO_PICTURES:
            raise UserError(
                "--size, --seed, --negative, --image and other pictures need --prompt; put them in the list"
            )
        requests = read_requests(prompts)
    elif out.suffix.lower().removeprefix(".") not in FORMATS:
        raise UserError(f"--out {out} has no known suffix; use one of .{', .'.join(FORMATS)}")
    else:
        grid = None if size is None else parse_size(size)
        requests = [Request(str(prompt), grid, seed or 0, negative, **pictures.read())]
    pipeline = options.load_pipeline(run, requests=requests, text_encoder=text_encoder)
    overrides = options.make_overrides(pipeline.config)
    if prompts is not None:
        with Progress("sampling", len(requests), unit="clip") as progress:
            write_samples(pipeline, requests, out, progress=progress.update, **overrides)
        print(f"{len(requests)} clips in {out}")
        return
    (clip,) = pipeline.generate_many(requests, **overrides)
    seconds = time.perf_counter() - start_time
    clip.save(out)
    print(f"{out}: {len(clip.frames)} frames of {clip.height}x{clip.width}, {seconds:.1f} s including loading")


def _make_entries(
    task: TaskName,
    prompt: str | None,
    prompts: Path | None,
    size: str | None,
    seed: int | None,
    pictures: PictureOptions,
    clips: TaskOptions,
) -> list[TaskEntry]:
    """Return the tasks of a list, or the one that the options describe."""
    check_minimum(0, seed=seed)
    files = {name: value for name, value in pictures.list_files().items() if value}
    if prompts is None:
        described = files | {"strength": pictures.strength}
        return [clips.make_entry(task, prompt=prompt, size=size, seed=seed or 0, pictures=described)]
    if prompt is not None or size is not None or seed is not None or files or clips != _NO_TASK:
        raise UserError("--prompt, --size, --seed, --clip and pictures are for one task; put them in the list")
    return read_tasks(prompts, task)


def _run_tasks(
    entries: list[TaskEntry],
    out: Path,
    pipeline: Pipeline,
    options: SamplingOptions,
    pictures: PictureOptions,
    negative: str | None,
) -> None:
    """Run tasks and write their results."""
    overrides = options.make_overrides(pipeline.config) | {"method": pictures.method, "resample": pictures.resample}
    with Progress("sampling", len(entries), unit="clip") as progress:
        paths = write_task_results(pipeline, entries, out, progress=progress.update, negative=negative, **overrides)
    print(f"{len(paths)} clips, contact_sheet.png and samples.jsonl in {out}")


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
