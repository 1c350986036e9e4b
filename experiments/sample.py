"""Sample clips from a run or a pipeline folder.

python experiments/sample.py experiments/pretrained/shapes --prompt "a red circle moving left" --out clip.mp4
python experiments/sample.py RUN --prompt "…" --size 17x32x48 --seed 3 --steps 50 --guidance 3 --out clip.gif
python experiments/sample.py RUN --prompt "…" --sampler unipc --steps 12 --guidance 6 --rescale 0.7 --out clip.mp4
python experiments/sample.py RUN --prompts prompts.json --out samples/
python experiments/sample.py Wan2.1-I2V-14B-480P-Diffusers --prompt "…" --image first.png --out clip.mp4
"""

from dit_video.platform.huge_pages import use_huge_pages

use_huge_pages(__name__)

import re
import time
from pathlib import Path
from typing import Annotated

import tyro

import dit_video
from dit_video.core.errors import UserError, script
from dit_video.evaluation import evaluate
from dit_video.platform.compilation_cache import keep_programs
from dit_video.tokens import Grid
from dit_video.training.hooks.logging import Progress
from dit_video.video.decode import decode
from dit_video.video.encode import FORMATS


def main(
    run: Annotated[Path, tyro.conf.Positional],
    out: Path,
    prompt: str | None = None,
    prompts: Path | None = None,
    size: str | None = None,
    seed: int | None = None,
    negative: str = "",
    image: Path | None = None,
    last_image: Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    interval: tuple[float, float] | None = None,
    rescale: float | None = None,
    projected: bool | None = None,
    text_encoder: Path | None = None,
    ema: float | None = None,
    sigma_rel: float | None = None,
    cache: bool = True,
) -> None:
    """Sample one prompt into a file, or a list of prompts into a folder.

    Args:
        run: a run folder, or a pipeline folder.
        out: with --prompt the file (mp4, webm, gif, apng; png for one frame), with --prompts the folder.
        prompt: what the clip is to show.
        prompts: a JSON list of {prompt, frames, height, width, seed}.
        size: frames x height x width, such as 17x32x48; the training size by default.
        seed: of the noise; 0 by default.
        negative: what guidance leads away from.
        image: what the clip begins with, of models that animate an image; a picture, or a video's first frame.
        last_image: what it ends with, of models that take that too.
        steps: of the sampler.
        guidance: how strongly the prompt is followed; 1 is not at all stronger than it was trained.
        sampler: such as euler, heun, unipc, dpm++2m or ddim.
        interval: the times, from 0 (data) to 1 (noise), at which there is guidance at all.
        rescale: from 0 to 1, how far guided predictions are brought to the deviation of those without guidance.
        projected: whether guidance leaves out what lies along the prediction itself, which saturates.
        text_encoder: where the model's frozen text encoder lies, if that has moved.
        ema: of a run: which of its averages, by its decay; 0 for the weights themselves.
        sigma_rel: of a run: the relative width of an average that is put together from its snapshots.
        cache: whether compiled programs are kept for the next start, in ~/.cache/dit_video/programs.
    """
    if (prompt is None) == (prompts is None):
        raise UserError("give either --prompt TEXT or --prompts FILE")
    if cache:
        keep_programs()
    began = time.perf_counter()
    if prompts is not None:
        if any(given not in (None, "") for given in (size, seed, negative, image, last_image)):
            raise UserError("--size, --seed, --negative, --image and --last-image go with --prompt, not --prompts")
        requests = evaluate.read_requests(prompts)
    elif out.suffix.lower().removeprefix(".") not in FORMATS:
        raise UserError(f"{out} has no suffix of a known format; use one of .{', .'.join(FORMATS)}")
    grid = None if size is None else parse_size(size)
    pipeline = dit_video.load(run, text_encoder=text_encoder, ema=ema, sigma_rel=sigma_rel)
    guided = pipeline.config.sampling.guided(scale=guidance, interval=interval, rescale=rescale, projected=projected)
    if prompts is not None:
        with Progress("sampling", len(requests), unit="clip") as progress:
            evaluate.write_samples(
                pipeline, requests, out, progress=progress.update, steps=steps, guidance=guided, sampler=sampler
            )
        print(f"{len(requests)} clips in {out}")
        return
    frame = (grid or pipeline.config.size)._replace(t=1)
    first, last = (None if path is None else decode(path, size=frame) for path in (image, last_image))
    clip = pipeline.generate(
        str(prompt),
        size=grid,
        seed=seed or 0,
        negative=negative,
        image=first,
        last_image=last,
        steps=steps,
        guidance=guided,
        sampler=sampler,
    )
    seconds = time.perf_counter() - began
    clip.save(out)
    print(f"{out}: {len(clip.frames)} frames of {clip.height}x{clip.width}, made in {seconds:.1f} s with loading")


def parse_size(text: str) -> Grid:
    """`17x32x48` as frames, height, width.

    Raises:
      UserError: anything else.
    """
    if not re.fullmatch(r"\d+x\d+x\d+", text):
        raise UserError(f"a size is frames x height x width such as 17x32x48, not {text!r}")
    return Grid(*map(int, text.split("x")))


if __name__ == "__main__":
    script(tyro.cli)(main)
