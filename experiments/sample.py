"""Sample clips from a run, a pipeline folder or a folder of open weights."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tyro

sys.path.insert(0, str(Path(__file__).parent))  # for a caller in another folder, such as a test

from model_options import ModelOptions
from sampling_options import SamplingOptions
from task_options import TaskOptions, make_default, make_subcommands

from dit_video.core.command_line import check_minimum, parse_arguments, parse_size
from dit_video.core.errors import UserError, script
from dit_video.core.files import check_writable, check_writable_folder
from dit_video.evaluation.samples import SampleFolder, check_only_samples, write_contact_sheet
from dit_video.families.expansion_options import ExpansionOptions
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import Method, Request
from dit_video.sampling.request_file import check_mask_key
from dit_video.sampling.tasks.task_file import TaskEntry, expand_entry, make_request, read_entries
from dit_video.tokens import Grid
from dit_video.training.hooks.logging import Progress
from dit_video.video import decode
from dit_video.video.encode import FORMATS, check_frames

if TYPE_CHECKING:
    AnyTaskOptions: TypeAlias = TaskOptions
else:
    AnyTaskOptions = make_subcommands()
_GENERATE, _MODEL, _SAMPLING, _EXPANSION = make_default(), ModelOptions(), SamplingOptions(), ExpansionOptions()


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Path,
    task: Annotated[AnyTaskOptions, tyro.conf.arg(name="")] = _GENERATE,
    prompts: Path | None = None,
    seed: int | None = None,
    negative: str | None = None,
    control: Path | None = None,
    reference_images: tuple[Path, ...] = (),
    method: Method = "auto",
    resample: int = 1,
    strengths: tuple[str, ...] = (),
    text_encoder: Path | None = None,
    image_encoder: Path | None = None,
    expansion: Annotated[ExpansionOptions, tyro.conf.arg(name="")] = _EXPANSION,
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = _MODEL,
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = _SAMPLING,
) -> None:
    """Sample a prompt, run a task on clips, or do so for a list of them.

    The name of a task after RUN chooses it, and generate is the default; RUN extend --help shows the options of one.
    For example:

        python experiments/sample.py experiments/pretrained/shapes --prompt "a red circle moving left" --out clip.mp4
        python experiments/sample.py RUN --prompt "…" --size 17x32x48 --seed 3 --steps 50 --guidance 3 --out clip.gif
        python experiments/sample.py RUN --prompt "…" --solver unipc --steps 12 --rescale 0.7 --out clip.mp4
        python experiments/sample.py RUN --prompts prompts.json --out samples/
        python experiments/sample.py RUN --prompt "a cat" --expand qwen3 --out clip.mp4
        python experiments/sample.py Wan2.1-I2V-14B-480P-Diffusers --prompt "…" --image first.png --out clip.mp4
        python experiments/sample.py RUN --prompt "…" --conditions first.png@0 middle.png@40@0.8 --out clip.mp4
        python experiments/sample.py RUN extend --clip clip.mp4 --frames 16 --prompt "…" --out longer.mp4
        python experiments/sample.py RUN inpaint --clip clip.mp4 --generated region.png --out inpainted.mp4

    Args:
        run: Folder of a run, a pipeline or open weights.
        out: File to write (mp4, mov, webm, gif, webp, apng; png or jpg for one frame), or folder of the results of a
            list, with prompts.json and a contact sheet. Files that exist are not made again.
        task: Task and its values.
        prompts: List of prompts, of {prompt, frames, height, width, seed, image, …} or of {task, seed, …} with the
            values of the task, in .json, .jsonl or .csv, or text file with a prompt on each line; see
            docs/evaluation.md. --size, --seed and --negative are those of entries that have none.
        seed: Seed of the noise; 0 by default. That of a list's first entry; further ones count up.
        negative: Negative prompt, which guidance steers away from; the model's own by default, none if "".
        control: Clip that steers what is generated, such as poses, depth or edges.
        reference_images: Images of subjects that the clip shows.
        method: Way to keep what is known: as the model was trained (trained), by replacement of latents
            (training_free), or the first where the model was trained for it (auto).
        resample: Number of times that training-free sampling takes every part of the steps.
        strengths: Strengths of conditioning, each NAME=NUMBER or, with one number for each layer, NAME=NUMBER,NUMBER,…
        text_encoder: Folder of the model's frozen text encoder, if it has been moved.
        image_encoder: Folder of the model's image encoder, if it has been moved.
        expansion: Language model that expands prompts.
        model: Weights, devices and memory.
        sampling: Steps, solver and guidance.
    """
    start_time = time.perf_counter()
    check_minimum(0, seed=seed)
    options = Request(
        "",
        seed=seed or 0,
        negative=negative,
        control=None if control is None else decode(control),
        reference_images=[decode(path, frames=1) for path in reference_images],
        method=method,
        resample=resample,
        strengths=dict(map(_parse_strength, strengths)),
    )
    is_named = type(task) is not type(_GENERATE) or getattr(task, "prompt", None) is not None
    if is_named == (prompts is not None):
        rule = "exactly one of --prompt, --prompts and the name of a task is needed"
        raise UserError(f"{rule}; use --prompt TEXT or --prompts FILE")
    entries: list[Request | TaskEntry]
    if prompts is None:
        entries = [TaskEntry(task.read(), options)]
    else:
        size: str | None = getattr(task, "size", None)
        own = replace(options, seed=0, negative=None)
        if replace(task, **({} if size is None else {"size": None})) != _GENERATE or own != Request(""):
            rule = "--image and other options of one clip need --prompt"
            raise UserError(f"{rule}; put them in the list")
        common = None if size is None else Grid(*parse_size(size))
        entries = read_entries(prompts, size=common, seed=seed, negative=negative)
    is_file, format = prompts is None and out.suffix != "", out.suffix.lower().removeprefix(".")
    if is_file:
        if format not in FORMATS:
            raise UserError(f"--out {out} has no known suffix; use one of .{', .'.join(FORMATS)}")
        check_writable(out)
    else:
        check_only_samples(out)
        check_writable_folder(out)

    def list_requests(config: PipelineConfig) -> list[Request]:
        if (expander := expansion.make_expander(config.model.backbone)) is not None:
            entries[:] = [expand_entry(entry, expander) for entry in entries]
        made = [request for request in (make_request(entry, config) for entry in entries) if request is not None]
        for request in made if is_file else ():
            assert request.size is not None  # resolved
            check_frames(*request.size, format=format)
        return made

    encoders: dict[str, Any] = {"text_encoder": text_encoder, "image_encoder": image_encoder}
    pipeline = model.load_pipeline(run, sampling, list_requests=list_requests, **encoders)
    chosen = sampling.make_sampling(pipeline.config)
    if is_file:
        (entry,) = entries
        assert isinstance(entry, TaskEntry)
        (clip,) = pipeline.run_many([entry.task], [entry.options], sampling=chosen)
        seconds = time.perf_counter() - start_time
        clip.save(out)
        print(f"{out}: {len(clip.frames)} frames of {clip.height}x{clip.width}, {seconds:.1f} s including loading")
        return
    _write_samples(SampleFolder(out, pipeline, entries, sampling=chosen))


def _write_samples(folder: SampleFolder) -> None:
    with Progress("sampling", len(folder), unit="clip") as progress:
        samples = folder.fill(progress.update)
    write_contact_sheet(samples)
    print(f"{len(folder)} clips, prompts.json and contact_sheet.png in {folder.folder}")


def _parse_strength(text: str) -> tuple[str, float | tuple[float, ...]]:
    name, _, numbers = text.partition("=")
    try:
        values = tuple(map(float, numbers.split(",")))
    except ValueError as error:
        raise UserError(f"--strengths {text} is invalid: it must be NAME=NUMBER. Use {name}=1.0") from error
    return name, values if len(values) > 1 else values[0]


def _run() -> None:
    """Run `main` with the command line, where an option of an older version is named first."""
    options = [argument for given in sys.argv for argument in given.split("=", 1)]
    if "--mask" in options[:-1]:
        check_mask_key({"mask": options[options.index("--mask") + 1]}, "--")
    parse_arguments(main, config=(tyro.conf.CascadeSubcommandArgs,))


if __name__ == "__main__":
    script(_run, is_resumable=False)()
