"""Sample clips from a run, a pipeline folder or a folder of open weights."""

from dit_video.platform.scripts import prepare_script

prepare_script(__name__)

import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parent))  # for a caller in another folder, such as a test

from picture_options import PictureOptions
from sampling_options import SamplingOptions

from dit_video.core.command_line import check_minimum, parse_arguments, parse_size
from dit_video.core.errors import UserError, script
from dit_video.evaluation.samples import write_samples
from dit_video.generation.request import Request
from dit_video.generation.request_file import read_requests
from dit_video.training.hooks.logging import Progress
from dit_video.video.encode import FORMATS

_DEFAULTS, _NO_PICTURES = SamplingOptions(), PictureOptions()


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Path,
    prompt: str | None = None,
    prompts: Path | None = None,
    size: str | None = None,
    seed: int | None = None,
    negative: str | None = None,
    pictures: Annotated[PictureOptions, tyro.conf.arg(name="")] = _NO_PICTURES,
    text_encoder: Path | None = None,
    options: Annotated[SamplingOptions, tyro.conf.arg(name="")] = _DEFAULTS,
) -> None:
    """Sample one prompt into a file, or a list of prompts into a folder.

    For example:

        python experiments/sample.py experiments/pretrained/shapes --prompt "a red circle moving left" --out clip.mp4
        python experiments/sample.py RUN --prompt "…" --size 17x32x48 --seed 3 --steps 50 --guidance 3 --out clip.gif
        python experiments/sample.py RUN --prompt "…" --sampler unipc --steps 12 --rescale 0.7 --out clip.mp4
        python experiments/sample.py RUN --prompts prompts.json --out samples/
        python experiments/sample.py Wan2.1-I2V-14B-480P-Diffusers --prompt "…" --image first.png --out clip.mp4
        python experiments/sample.py RUN --prompt "…" --conditions first.png@0 middle.png@40@0.8 --out clip.mp4

    Args:
        run: Folder of a run, a pipeline or open weights.
        out: File to write with --prompt (mp4, webm, gif, apng; png for one frame), or folder to write with --prompts.
        prompt: Description of the clip.
        prompts: JSON file with a list of {prompt, frames, height, width, seed, image, …}; see docs/evaluation.md.
        size: Number of frames, height and width, such as 17x32x48; the training size by default.
        seed: Seed of the noise; 0 by default.
        negative: Negative prompt, which guidance steers away from; the model's own by default, none if "".
        pictures: Images and clips that the clip keeps or follows, in models that accept them.
        text_encoder: Folder of the model's frozen text encoder, if it has been moved.
        options: Weights and sampling.
    """
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


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
