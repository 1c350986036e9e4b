"""Evaluation of a model by a protocol: samples that are made once, or reconstructions, and their metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.rng import make_generator
from dit_video.data.latents.codec import compute_autoencoder_identity
from dit_video.evaluation.clip_set import ClipSet, make_file_set
from dit_video.evaluation.measure import Measurement, check_computable, measure
from dit_video.evaluation.metrics.metric import MetricInput
from dit_video.evaluation.protocol import Protocol
from dit_video.evaluation.sample_store import SampleStore
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Request
from dit_video.tokens import Grid
from dit_video.video import Clip

SAMPLES_FOLDER = "protocol_samples"
OnProgress = Callable[[int], None]


class ProtocolResult(NamedTuple):
    """Result of a model's evaluation, with the clips that it was computed on."""

    measurement: Measurement
    protocol: Protocol
    """Protocol, completed by what the model determines."""
    samples: ClipSet
    """Samples or reconstructions; none if the model itself is measured on data clips."""
    real_clips: ClipSet | None


def is_reconstruction(protocol: Protocol) -> bool:
    """Return True for a protocol that compares clips with their reconstructions."""
    return any("pairs" in metric.needs for metric in protocol.metrics)


def evaluate_protocol(
    pipeline: Pipeline,
    protocol: Protocol,
    folder: str | Path,
    *,
    data: ClipSet | None = None,
    average: Mapping[str, float | None] | None = None,
    sampling: Sampling | None = None,
    sampling_progress: OnProgress | None = None,
    progress: OnProgress | None = None,
) -> ProtocolResult:
    """Sample or reconstruct as a protocol says, compute its metrics, and write `metrics.json`.

    Samples are in the folder's `protocol_samples/NAME`. Existing samples are not made again, so that a killed run goes
    on and further metrics use the same samples. In a run of several processes all of them call this with a folder that
    they share: they sample together, and each decodes and measures a part of the clips.

    Args:
      pipeline: The model.
      protocol: What is sampled and measured.
      folder: Folder of the results.
      data: Data clips with captions; not needed for a protocol that renders scenes.
      average: Average of a run's weights that the pipeline has, as passed to `dit_video.load`; it is part of the
        recorded protocol. None for the model's own weights.
      sampling: Steps, solver and guidance; the pipeline's own by default.
      sampling_progress: Called with the number of samples that exist.
      progress: Called with the number of clips that were measured.

    Raises:
      UserError: If there are no data, clips have no captions, the folder holds samples of other settings, or `measure`
        raises it.
    """
    folder, truths, sizes = Path(folder), tuple[Any, ...](), tuple[Grid, ...]()
    if (scenes := protocol.make_scenes()) is not None:
        data, truths, sizes = scenes
    if data is None:
        raise UserError(f"the protocol {protocol.name} needs clips of the data. Name their folder with --data")
    samples, weights = make_file_set(folder, (), ()), pipeline.compute_digest()
    recorded: dict[str, Any] = {"average": dict(average or {})}
    if is_reconstruction(protocol):
        protocol, samples = _reconstruct(pipeline, protocol, data)
        recorded |= {"autoencoder": config_json.to_json(pipeline.config.model.autoencoder)}
    elif any("samples" in metric.needs for metric in protocol.metrics):
        requests, numbers = make_requests(pipeline, protocol, data, sizes=sizes)
        clips = [partial(data.read, number, None) for number in numbers]
        requests = protocol.add_known_frames(requests, clips, fps=pipeline.config.fps)
        own: tuple[MetricInput, ...] = ("scenes",) if truths else ()
        check_computable(protocol, ("samples", "prompts", "real_clips", "pipeline", *own))
        sampling = pipeline.make_sampling(sampling)
        made = {"sampling": config_json.to_json(sampling)}
        recorded |= made
        settings = made | {"weights": weights, "codec": [protocol.codec, protocol.crf]}
        store = SampleStore(
            folder / SAMPLES_FOLDER / protocol.name, requests, settings, suffix=protocol.codec, crf=protocol.crf
        )
        store.fill(pipeline, sampling=sampling, progress=sampling_progress)
        samples = store.open()
        truths = tuple(truths[number] for number in numbers) if truths else ()
    else:
        config = pipeline.config
        recorded = {
            "autoencoder": compute_autoencoder_identity(config.model.autoencoder, pipeline.codec.params),
            "objective": [config_json.to_json(config.model.process), config_json.to_json(config.model.prediction)],
        }
    measurement = measure(
        samples,
        protocol,
        folder,
        real_clips=data,
        is_reconstruction=is_reconstruction(protocol),
        truths=truths,
        pipeline=pipeline,
        recorded=recorded,
        model={"weights": weights, "parameters": pipeline.count_parameters()},
        progress=progress,
    )
    return ProtocolResult(measurement, protocol, samples, data)


def make_requests(
    pipeline: Pipeline, protocol: Protocol, data: ClipSet, *, sizes: Sequence[Grid] = ()
) -> tuple[list[Request], list[int]]:
    """Return the requests of a protocol, and the number of the data clip whose caption each has.

    Samples have the model's own height and width, and enough frames for the measurement.

    Args:
      pipeline: The model.
      protocol: The protocol.
      data: Clips with captions.
      sizes: Size for each clip's caption instead.

    Raises:
      UserError: If clips have no captions, or the model cannot generate a size.
    """
    if lacking := [name for name, caption in zip(data.names, data.captions, strict=True) if not caption]:
        raise UserError(
            f"{len(lacking)} of {len(data.names)} clips of {data.location} have no caption, such as {lacking[0]}. "
            "Give them captions, or evaluate a folder of samples"
        )
    chosen = protocol.choose(len(data.names), protocol.count, purpose="prompts")
    numbers = [chosen[index] for index in protocol.repeat_captions(len(chosen))]
    default, stride = pipeline.config.size, pipeline.config.model.autoencoder.stride.t
    frames = protocol.clips.frames or default.t
    size = default._replace(t=1 + -(-(frames - 1) // stride) * stride)
    seeds = make_generator(protocol.seed, "seeds of samples").integers(2**32, size=len(numbers)).tolist()
    requests = [
        Request(data.captions[number], sizes[number] if sizes else size, seed)
        for number, seed in zip(numbers, seeds, strict=True)
    ]
    for request in requests:
        pipeline.config.model.latent_grid(pipeline.config.resolve_size(request))
    return requests, numbers


def _reconstruct(pipeline: Pipeline, protocol: Protocol, data: ClipSet) -> tuple[Protocol, ClipSet]:
    """Return the protocol with the autoencoder's size steps, and the reconstructions, made when they are read."""
    stride = pipeline.config.model.autoencoder.stride
    adapted = replace(protocol, clips=replace(protocol.clips, multiple=(stride.t, stride.h, stride.w)))

    def read(index: int, fps: float | None) -> Clip:
        original = adapted.clips.sample(data.read(index, fps), seed=adapted.seed, number=index)
        return pipeline.codec.reconstruct(original)

    return adapted, data._replace(location=f"reconstructions of {data.location}", read=read)
