"""Evaluation of a pipeline: reconstructions of held-out clips, and samples judged from their files."""

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
from dit_video.data.sizes import SizeLimits, fit_size, read_fitted_clip
from dit_video.data.synthetic import shapes
from dit_video.diffusion import SAMPLERS, Guidance, Solver
from dit_video.encoders.autoencoder import LatentCodec
from dit_video.evaluation.config import ShapesEvaluation
from dit_video.evaluation.metrics.prompt_following import JudgedSample, judge_sample, prompt_following
from dit_video.evaluation.metrics.reconstruction import psnr, ssim
from dit_video.experiment.run import Run
from dit_video.pipelines.pipeline import Pipeline, PipelineConfig, Request
from dit_video.tokens import Grid
from dit_video.training.hooks.logging import Progress
from dit_video.video import Clip, decode

PROMPTS_FILE = "prompts.json"
_ENTRY_TYPES = {"prompt": str, "frames": int, "height": int, "width": int, "seed": int, "negative": str}


class ClipReconstruction(NamedTuple):
    """A clip, its reconstruction, and how close they are."""

    name: str
    original: Clip
    decoded: Clip
    psnr: float
    """PSNR of the reconstruction, in dB."""
    ssim: float
    linear_decoded: Clip | None = None
    """Reconstruction by the best linear autoencoder with as many latent values, fitted on the training clips."""
    linear_psnr: float | None = None


class SavedSample(NamedTuple):
    """A sample's entry in `prompts.json`, and its decoded file."""

    entry: dict[str, Any]
    clip: Clip


class EvaluationResult(NamedTuple):
    """Metrics of an evaluation, with the clips that they were computed on."""

    metrics: dict[str, Any]
    reconstructions: list[ClipReconstruction]
    samples: list[SavedSample]
    is_trained_caption: list[bool]
    """True for each sample whose caption belongs to a training clip."""
    judgements: list[JudgedSample]
    """Judgement of each sample of the shapes data; empty for other data, which are not judged."""


def evaluate(
    pipeline: Pipeline, folder: str | Path, *, seed: int, run: Run | None = None, **sampling: Any
) -> EvaluationResult:
    """Reconstruct held-out clips, sample as the pipeline's config says, and write `samples/` and `metrics.json`.

    Args:
      pipeline: the pipeline to evaluate.
      folder: folder of the results.
      seed: seed of the samples.
      run: the pipeline's run, which has the clips; without it nothing is reconstructed.
      sampling: overrides of the pipeline's own sampling (see `Pipeline.generate_many`).

    Raises:
      UserError: nothing to evaluate on, other files in `samples/` of `folder`, a negative seed, or invalid sampling.
    """
    folder = Path(folder)
    if seed < 0:
        raise UserError(f"seed={seed} is invalid: a seed must be a whole number from 0 on")
    _check_replaceable(folder / "samples")
    resolved = pipeline.resolve_sampling(**sampling)
    is_shapes = isinstance(pipeline.config.evaluation, ShapesEvaluation)
    labelled_requests = _make_requests(pipeline.config, run, seed)
    metrics: dict[str, Any] = {"parameters": pipeline.count_parameters()}
    reconstructions = [] if run is None else _reconstruct_held_out(pipeline.codec, run)
    if reconstructions:
        metrics["reconstruction"] = _compute_reconstruction_metrics(reconstructions)
    start_time = time.perf_counter()
    with Progress("sampling", len(labelled_requests), unit="clip") as progress:
        requests = [request for request, _ in labelled_requests]
        write_samples(pipeline, requests, folder / "samples", progress=progress.update, **sampling)
    metrics["sampling"] = {
        "samples": len(labelled_requests),
        "seed": seed,
        "steps": resolved.steps,
        **_describe_guidance(resolved.full_guidance),
        "sampler": _get_sampler_name(resolved.solver),
        "seconds": round(time.perf_counter() - start_time, 1),
    }
    samples = read_samples(folder / "samples")
    verdicts = judge_samples(samples) if is_shapes else []
    if is_shapes:
        metrics["prompt_following"] = prompt_following(verdicts)
    write_json(folder / "metrics.json", metrics)
    return EvaluationResult(metrics, reconstructions, samples, [seen for _, seen in labelled_requests], verdicts)


def _get_sampler_name(solver: Solver) -> str:
    """Return the command line's name of a sampler, else its class."""
    return next((name for name, sampler in SAMPLERS.items() if sampler == solver), type(solver).__name__.lower())


def _describe_guidance(guidance: Guidance) -> dict[str, Any]:
    """Return the guidance scale, and all options if they are not at their defaults."""
    plain = guidance == Guidance(scale=guidance.scale)
    return {"guidance": guidance.scale} | ({} if plain else {"guidance_options": config_json.to_json(guidance)})


def evaluate_autoencoder(run: Run, folder: str | Path) -> EvaluationResult:
    """Reconstruct the held-out clips of a run that trains an autoencoder only, and write `metrics.json`.

    Raises:
      UserError: no clips are held out.
    """
    codec = run.codec()
    reconstructions = _reconstruct_held_out(codec, run)
    if not reconstructions:
        raise UserError("no clips are held out to be reconstructed; name some with --data.held-out")
    metrics = {
        "parameters": {"autoencoder": codec.count_parameters()},
        "reconstruction": _compute_reconstruction_metrics(reconstructions),
    }
    write_json(Path(folder) / "metrics.json", metrics)
    return EvaluationResult(metrics, reconstructions, [], [], [])


def _reconstruct_held_out(codec: LatentCodec, run: Run) -> list[ClipReconstruction]:
    """Reconstruct the held-out clips of a run, if any, also with the best linear autoencoder."""
    if not len(run.held_out_clips):
        return []
    return reconstruct(codec, run.held_out_clips, run.experiment.limits, linear=run.linear_baseline())


def _make_requests(config: PipelineConfig, run: Run | None, seed: int) -> list[tuple[Request, bool]]:
    """Return the requests, and for each whether its caption belongs to a training clip."""
    evaluation = config.evaluation
    if isinstance(evaluation, ShapesEvaluation):
        return [
            (request, shapes.parse_caption(request.prompt) not in shapes.HELD_OUT)
            for request in make_shape_requests(seed)
        ]
    requests: list[tuple[Request, bool]] = []
    if run is not None:
        common: dict[str, Any] = {"seed": seed, "use_first_frame": bool(config.dit.cond_channels)}
        limits = run.experiment.limits
        trained = make_caption_requests(run.training_clips, limits, count=evaluation.trained, **common)
        held_out = make_caption_requests(
            run.held_out_clips, limits, count=evaluation.held_out, first_index=len(trained), **common
        )
        requests = [(request, True) for request in trained] + [(request, False) for request in held_out]
    if not requests:
        raise UserError("there are no captions to sample; give clips captions, or sample prompts with sample.py")
    return requests


def _compute_reconstruction_metrics(reconstructions: Sequence[ClipReconstruction]) -> dict[str, Any]:
    metrics = {}
    for item in reconstructions:
        metrics[item.name] = {"psnr": _cap_psnr(item.psnr), "ssim": item.ssim}
        if item.linear_psnr is not None:
            metrics[item.name]["linear_psnr"] = _cap_psnr(item.linear_psnr)
    names = next(iter(metrics.values()))
    return {name: float(np.mean([entry[name] for entry in metrics.values()])) for name in names} | {"clips": metrics}


def _cap_psnr(value: float) -> float:
    """Cap a PSNR at 100 dB: that of equal clips is infinite, which JSON cannot hold."""
    return min(value, 100.0)


def reconstruct(
    codec: LatentCodec, clips: ClipSource, limits: SizeLimits, *, linear: LinearAutoencoder | None = None
) -> list[ClipReconstruction]:
    """Encode and decode the start of every clip at its training size, also by a linear autoencoder if one is given."""
    results = []
    for index, info in enumerate(clips.infos):
        original = read_fitted_clip(clips, index, limits)
        decoded = codec.reconstruct(original)
        quality = psnr(original.frames, decoded.frames), ssim(original.frames, decoded.frames)
        reconstruction = ClipReconstruction(info.name, original, decoded, *quality)
        if linear is not None:
            frames = linear.reconstruct_clip(original.frames, codec.config.stride)
            reconstruction = reconstruction._replace(
                linear_decoded=replace(original, frames=frames), linear_psnr=psnr(original.frames, frames)
            )
        results.append(reconstruction)
    return results


def make_shape_requests(seed: int) -> list[Request]:
    """Return all 72 prompts at 17 and 9 frames, and the 18 image prompts, each once at one of three sizes."""
    prompts = [
        (frames, description)
        for frames, descriptions in ((17, shapes.COMBINATIONS), (9, shapes.COMBINATIONS), (1, shapes.IMAGES))
        for description in descriptions
    ]
    sizes = ((32, 32), (32, 48), (48, 32))
    size_indices = rng.make_generator(seed, "sample sizes").permutation(np.arange(len(prompts)) % len(sizes)).tolist()
    return [
        Request(shapes.format_caption(description), Grid(frames, *sizes[size]), seed=_make_seed(seed, number))
        for number, ((frames, description), size) in enumerate(zip(prompts, size_indices, strict=True))
    ]


def make_caption_requests(
    clips: ClipSource, limits: SizeLimits, *, count: int, seed: int, first_index: int = 0, use_first_frame: bool = False
) -> list[Request]:
    """Return requests for up to `count` different captions, spread over the clips, each at its clip's training size.

    `first_index` is the number of the first request in its evaluation, which determines its seed. With
    `use_first_frame` a request starts from the first frame of the clip.
    """
    different: dict[str, int] = {}
    for index, info in enumerate(clips.infos):
        if info.caption:
            different.setdefault(info.caption, index)
    positions = np.linspace(0, len(different) - 1, min(count, len(different))).round().astype(int)
    indices = [list(different.values())[position] for position in positions.tolist()]
    return [
        Request(
            clips.infos[index].caption,
            fit_size(clips.infos[index], limits),
            seed=_make_seed(seed, first_index + number),
            image=read_fitted_clip(clips, index, limits).frames[0] if use_first_frame else None,
        )
        for number, index in enumerate(indices)
    ]


def _make_seed(seed: int, number: int) -> int:
    """Return a seed that differs between the requests of an evaluation, and between evaluations."""
    return (1000 * seed + number) % 2**32


def read_requests(path: str | Path) -> list[Request]:
    """Read requests from a JSON list of `{prompt, frames, height, width}` with optional `seed` and `negative`.

    Raises:
      MissingError: no file at `path`.
      UserError: the file is not such a list.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must be a JSON list of objects with prompt, frames, height and width")
    requests = []
    for number, entry in enumerate(entries):
        values = {"seed": 0, "negative": "", **entry} if isinstance(entry, dict) else {}
        for name, kind in _ENTRY_TYPES.items():
            if type(values.get(name)) is not kind:  # `True` is an int to isinstance
                expected = "a text" if kind is str else "a whole number"
                raise UserError(f"{path}: {name} of entry {number} must be {expected}, not {values.get(name)!r}")
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
    """Sample all requests into `folder`: one file each (mp4; png for one frame), and `prompts.json`, which is returned.

    The folder is complete or absent; samples in it are replaced. `progress` is called with the number of finished
    clips; `sampling` is passed to `Pipeline.generate_many`.

    Raises:
      UserError: the folder holds files that are not samples, or an invalid request.
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
                entries.append({"file": name, **_make_entry(request)})
                if progress is not None:
                    progress(len(entries))
        write_json(temporary / PROMPTS_FILE, entries)
    return entries


def _make_entry(request: Request) -> dict[str, Any]:
    """Return the JSON entry of a request, which `read_requests` reads."""
    frames, height, width = request.size
    entry = {"prompt": request.prompt, "frames": frames, "height": height, "width": width, "seed": request.seed}
    return entry | ({"negative": request.negative} if request.negative else {})


def _check_replaceable(folder: Path) -> None:
    """Raise if the folder holds anything other than samples."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder for the samples")
    present = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    written = read_json(folder / PROMPTS_FILE) if PROMPTS_FILE in present else []
    samples = {entry["file"] for entry in written if isinstance(entry, dict) and "file" in entry}
    expected = samples | {PROMPTS_FILE} if samples else set()
    if foreign := sorted(present - expected):
        raise UserError(f"{folder} holds other files than samples, such as {foreign[0]}; use another folder")


def read_samples(folder: str | Path) -> list[SavedSample]:
    """Read the samples that `prompts.json` lists, decoded from their files."""
    folder = Path(folder)
    return [
        SavedSample(entry, replace(decode(folder / entry["file"]), caption=entry["prompt"]))
        for entry in read_json(folder / PROMPTS_FILE)
    ]


def judge_samples(samples: Sequence[SavedSample]) -> list[JudgedSample]:
    """Judge samples of the shapes data from the pixels of their files."""
    return [judge_sample(shapes.parse_caption(sample.entry["prompt"]), sample.clip) for sample in samples]


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "unconditional"
