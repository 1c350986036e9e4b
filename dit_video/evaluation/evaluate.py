"""What a pipeline is worth: reconstructions of held-out clips, and samples judged by their files."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_video.autoencoders import LinearAutoencoder
from dit_video.core import config_json, rng
from dit_video.core.errors import UserError
from dit_video.core.files import atomic_path, read_json, write_json
from dit_video.data.clips import ClipSource
from dit_video.data.sizes import SizeLimits, fit, read_fitted
from dit_video.data.synthetic import shapes
from dit_video.diffusion import SAMPLERS, Guidance, Sampler
from dit_video.encoders.autoencoder import Codec
from dit_video.evaluation.config import ShapesEvaluation
from dit_video.evaluation.metrics.prompt_following import Result, examine, prompt_following
from dit_video.evaluation.metrics.reconstruction import psnr, ssim
from dit_video.experiment.run import Run
from dit_video.pipelines.pipeline import Pipeline, PipelineConfig, Request
from dit_video.tokens import Grid
from dit_video.training.hooks.logging import Progress
from dit_video.video import Clip, decode

PROMPTS = "prompts.json"
_FIELDS = {"prompt": str, "frames": int, "height": int, "width": int, "seed": int, "negative": str}


class Reconstructed(NamedTuple):
    """A clip, what the autoencoder makes of it, and how close that is."""

    name: str
    original: Clip
    decoded: Clip
    psnr: float
    """dB"""
    ssim: float
    linear: Clip | None = None
    """what the best linear autoencoder of as many latent values makes of it, fitted on the training clips"""
    linear_psnr: float | None = None


class Sampled(NamedTuple):
    """A sample's entry in `prompts.json`, and its decoded file."""

    entry: dict[str, Any]
    clip: Clip


class Measured(NamedTuple):
    """An evaluation: its figures, and what they are of."""

    metrics: dict[str, Any]
    reconstructions: list[Reconstructed]
    samples: list[Sampled]
    seen: list[bool]
    """of every sample, whether clips of its caption were trained on"""
    verdicts: list[Result]
    """one a sample of the shapes data; empty for samples of other data, which nobody judges"""


def evaluate(pipeline: Pipeline, folder: str | Path, *, seed: int, run: Run | None = None, **sampling: Any) -> Measured:
    """Reconstruct the held-out clips, sample as the pipeline's config says, write `samples/` and `metrics.json`.

    Args:
      pipeline: what is evaluated.
      folder: where the files go.
      seed: of the samples.
      run: that it is of, which has the clips; without it nothing is reconstructed.
      sampling: instead of the pipeline's own (see `Pipeline.generate_many`).

    Raises:
      UserError: there is nothing to evaluate on, `folder` holds other files in `samples/`, a negative seed, or sampling
        that the pipeline refuses.
    """
    folder = Path(folder)
    if seed < 0:
        raise UserError(f"a seed is a whole number from 0 on, not {seed}")
    _check_replaceable(folder / "samples")
    drawn = pipeline.sampling(**sampling)
    judged = isinstance(pipeline.config.evaluation, ShapesEvaluation)
    asked = _asked(pipeline.config, run, seed)
    metrics: dict[str, Any] = {"parameters": pipeline.parameter_counts()}
    reconstructions = [] if run is None else _reconstructed(pipeline.codec, run)
    if reconstructions:
        metrics["reconstruction"] = _reconstruction_figures(reconstructions)
    began = time.perf_counter()
    with Progress("sampling", len(asked), unit="clip") as progress:
        requests = [request for request, _ in asked]
        write_samples(pipeline, requests, folder / "samples", progress=progress.update, **sampling)
    metrics["sampling"] = {
        "samples": len(asked),
        "seed": seed,
        "steps": drawn.steps,
        **_guidance_figures(drawn.full_guidance),
        "sampler": _name(drawn.solver),
        "seconds": round(time.perf_counter() - began, 1),
    }
    samples = read_samples(folder / "samples")
    verdicts = examine_samples(samples) if judged else []
    if judged:
        metrics["prompt_following"] = prompt_following(verdicts)
    write_json(folder / "metrics.json", metrics)
    return Measured(metrics, reconstructions, samples, [seen for _, seen in asked], verdicts)


def _name(solver: Sampler) -> str:
    """What a person types, or else the class."""
    names = [name for name, known in SAMPLERS.items() if known == solver]
    return names[0] if names else type(solver).__name__.lower()


def _guidance_figures(guidance: Guidance) -> dict[str, Any]:
    """The scale, and what there is besides."""
    plain = guidance == Guidance(scale=guidance.scale)
    return {"guidance": guidance.scale} | ({} if plain else {"guidance_options": config_json.to_json(guidance)})


def evaluate_autoencoder(run: Run, folder: str | Path) -> Measured:
    """Reconstruct the held-out clips of a run whose autoencoder alone is trained, and write `metrics.json`.

    Raises:
      UserError: no clips are held out.
    """
    codec = run.codec()
    reconstructions = _reconstructed(codec, run)
    if not reconstructions:
        raise UserError("no clips are held out to be reconstructed; name some with --data.held-out")
    metrics = {
        "parameters": {"autoencoder": codec.parameter_count()},
        "reconstruction": _reconstruction_figures(reconstructions),
    }
    write_json(Path(folder) / "metrics.json", metrics)
    return Measured(metrics, reconstructions, [], [], [])


def _reconstructed(codec: Codec, run: Run) -> list[Reconstructed]:
    """The held-out clips of a run, if there are any, beside what is best that is linear."""
    if not len(run.held_out_clips):
        return []
    return reconstruct(codec, run.held_out_clips, run.experiment.limits, linear=run.linear_baseline())


def _asked(config: PipelineConfig, run: Run | None, seed: int) -> list[tuple[Request, bool]]:
    """What is sampled, and whether clips of that caption were trained on."""
    evaluation = config.evaluation
    if isinstance(evaluation, ShapesEvaluation):
        return [(request, shapes.parse(request.prompt) not in shapes.HELD_OUT) for request in shape_requests(seed)]
    requests: list[tuple[Request, bool]] = []
    if run is not None:
        common: dict[str, Any] = {"seed": seed, "animated": bool(config.dit.given_channels)}
        limits = run.experiment.limits
        trained = caption_requests(run.training_clips, limits, count=evaluation.trained, **common)
        held_out = caption_requests(run.held_out_clips, limits, count=evaluation.held_out, first=len(trained), **common)
        requests = [(request, True) for request in trained] + [(request, False) for request in held_out]
    if not requests:
        raise UserError("there are no captions to sample; give clips captions, or sample prompts with sample.py")
    return requests


def _reconstruction_figures(reconstructions: Sequence[Reconstructed]) -> dict[str, Any]:
    each = {one.name: {"psnr": _finite(one.psnr), "ssim": one.ssim} for one in reconstructions}
    for one in reconstructions:
        if one.linear_psnr is not None:
            each[one.name]["linear_psnr"] = _finite(one.linear_psnr)
    names = next(iter(each.values()))
    return {name: float(np.mean([entry[name] for entry in each.values()])) for name in names} | {"clips": each}


def _finite(value: float) -> float:
    """JSON has no infinity: the PSNR of equal clips is written as 100 dB."""
    return min(value, 100.0)


def reconstruct(
    codec: Codec, clips: ClipSource, limits: SizeLimits, *, linear: LinearAutoencoder | None = None
) -> list[Reconstructed]:
    """The start of every clip, at its training size, encoded and decoded; by a linear autoencoder too, if given."""
    results = []
    for index, info in enumerate(clips.infos):
        original = read_fitted(clips, index, limits)
        decoded = codec.reconstruct(original)
        one = Reconstructed(
            info.name,
            original,
            decoded,
            psnr(original.frames, decoded.frames),
            ssim(original.frames, decoded.frames),
        )
        if linear is not None:
            frames = linear.reconstruct_clip(original.frames, codec.config.stride)
            one = one._replace(linear=replace(original, frames=frames), linear_psnr=psnr(original.frames, frames))
        results.append(one)
    return results


def shape_requests(seed: int) -> list[Request]:
    """All 72 prompts at 17 and 9 frames and the 18 image prompts, each at one of three sizes; one sample a prompt."""
    asked = [
        (Grid(frames, 0, 0), description)
        for frames, descriptions in ((17, shapes.COMBINATIONS), (9, shapes.COMBINATIONS), (1, shapes.IMAGES))
        for description in descriptions
    ]
    sizes = ((32, 32), (32, 48), (48, 32))
    chosen = rng.host(seed, "sample sizes").permutation(np.arange(len(asked)) % len(sizes))
    return [
        Request(shapes.caption(description), Grid(frames.t, *sizes[size]), seed=_seed(seed, number))
        for number, ((frames, description), size) in enumerate(zip(asked, chosen.tolist(), strict=True))
    ]


def caption_requests(
    clips: ClipSource, limits: SizeLimits, *, count: int, seed: int, first: int = 0, animated: bool = False
) -> list[Request]:
    """Up to `count` different captions, spread over the clips, each at its clip's training size.

    `first` is the number of the first request in its evaluation, which gives it its seed. What is `animated` begins
    with the first frame of the clip.
    """
    different: dict[str, int] = {}
    for index, info in enumerate(clips.infos):
        if info.caption:
            different.setdefault(info.caption, index)
    places = np.linspace(0, len(different) - 1, min(count, len(different))).round().astype(int)
    chosen = [list(different.values())[place] for place in places.tolist()]
    return [
        Request(
            clips.infos[index].caption,
            fit(clips.infos[index], limits),
            seed=_seed(seed, first + number),
            image=read_fitted(clips, index, limits).frames[0] if animated else None,
        )
        for number, index in enumerate(chosen)
    ]


def _seed(seed: int, number: int) -> int:
    """Of each request of an evaluation another one, and of two evaluations too."""
    return (1000 * seed + number) % 2**32


def read_requests(path: str | Path) -> list[Request]:
    """Requests from a JSON list of `{prompt, frames, height, width, seed, negative}`; seed and negative may be absent.

    Raises:
      MissingError: no such file.
      UserError: not such a list.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must be a JSON list of objects with prompt, frames, height and width")
    requests = []
    for number, entry in enumerate(entries):
        values = {"seed": 0, "negative": "", **entry} if isinstance(entry, dict) else {}
        for name, kind in _FIELDS.items():
            if type(values.get(name)) is not kind:  # `True` is an int to isinstance
                what = "a text" if kind is str else "a whole number"
                raise UserError(f"{path}: {name} of entry {number} must be {what}, not {values.get(name)!r}")
        size = Grid(values["frames"], values["height"], values["width"])
        requests.append(Request(values["prompt"], size, values["seed"], values["negative"]))
    return requests


def write_samples(
    pipeline: Pipeline,
    requests: Sequence[Request],
    folder: str | Path,
    *,
    progress: Callable[[int], None] | None = None,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """Sample all requests into `folder`: a file each (mp4; png for one frame) and `prompts.json`, which is returned.

    The folder is written whole or not at all; samples that it holds are replaced. `progress` is called with the number
    of clips done; `sampling` goes to `Pipeline.generate_many`.

    Raises:
      UserError: the folder holds files that are no samples, or a request that cannot be made.
    """
    folder = Path(folder).absolute()
    _check_replaceable(folder)
    entries: list[dict[str, Any]] = []
    group = max(1, 4 * pipeline.config.batch)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for start in range(0, len(requests), group):
            part = requests[start : start + group]
            for request, clip in zip(part, pipeline.generate_many(part, **sampling), strict=True):
                name = f"{len(entries):03d}-{_slug(request.prompt)}.{'png' if request.size[0] == 1 else 'mp4'}"
                clip.save(temporary / name)
                entries.append({"file": name, **_entry(request)})
                if progress is not None:
                    progress(len(entries))
        write_json(temporary / PROMPTS, entries)
    return entries


def _entry(request: Request) -> dict[str, Any]:
    """What `read_requests` reads again."""
    frames, height, width = request.size
    entry = {"prompt": request.prompt, "frames": frames, "height": height, "width": width, "seed": request.seed}
    return entry | ({"negative": request.negative} if request.negative else {})


def _check_replaceable(folder: Path) -> None:
    """Raise where something else than samples would be overwritten."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder for the samples")
    present = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    written = read_json(folder / PROMPTS) if PROMPTS in present else []
    samples = {entry["file"] for entry in written if isinstance(entry, dict) and "file" in entry}
    known = samples | {PROMPTS} if samples else set()
    if foreign := sorted(present - known):
        raise UserError(f"{folder} holds other files than samples, such as {foreign[0]}; name a folder of their own")


def read_samples(folder: str | Path) -> list[Sampled]:
    """The samples that `prompts.json` lists, decoded from their files."""
    folder = Path(folder)
    return [
        Sampled(entry, replace(decode(folder / entry["file"]), caption=entry["prompt"]))
        for entry in read_json(folder / PROMPTS)
    ]


def examine_samples(samples: Sequence[Sampled]) -> list[Result]:
    """Judge samples of the shapes data from the pixels of their files."""
    return [examine(shapes.parse(sample.entry["prompt"]), sample.clip) for sample in samples]


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "unconditional"
