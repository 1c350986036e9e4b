"""Protocols: what is sampled and measured, which is all besides the model that a figure depends on."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

from dit_video.core import config_json
from dit_video.core.errors import UserError, check_at_least
from dit_video.core.rng import make_generator
from dit_video.evaluation.clip_set import NO_CLIPS, ClipSet
from dit_video.evaluation.metrics.metric import Metric, MetricInput
from dit_video.models.autoencoders import LinearAutoencoder
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Request
from dit_video.sampling.tasks.task_file import TaskEntry
from dit_video.tokens import Grid
from dit_video.video import Clip

Filter = Literal["bilinear", "bicubic", "lanczos", "box"]


@dataclass(frozen=True, kw_only=True)
class ClipSampling:
    """Frames of clips that are measured.

    Raises:
      UserError: If a size is empty.
    """

    frames: int | None = None
    """Number of frames; None for all frames of each clip."""
    fps: float | None = None
    """Frame rate that clips are sampled at; None for their own."""
    start: Literal["first", "middle", "random"] = "first"
    """Position of the frames in a longer clip."""
    size: tuple[int, int] | None = None
    """Height and width: the largest centred part with this aspect ratio is resized to them; None for each clip's
    own."""
    filter: Filter = "bicubic"
    """Pillow's resampling filter, which is wider when pictures become smaller (against aliasing)."""
    multiple: tuple[int, int, int] = (1, 1, 1)
    """Step of sizes: frames are 1 + k times the first number, heights and widths are multiples of the others, as an
    autoencoder needs. The excess is cut off; in height and width, on both sides."""

    def __post_init__(self):
        sides = self.size or (1, 1)
        check_at_least(1, frames=self.frames or 1, size=min(sides), multiple=min(self.multiple))

    def sample(self, clip: Clip, *, seed: int, number: int) -> Clip:
        """Return the frames of a clip that are measured.

        Args:
          clip: The clip, already at the sampled rate.
          seed: Seed of random positions.
          number: Number of the clip in its set; the random position is a function of it.

        Raises:
          UserError: If the clip has too few frames.
        """
        total, count = len(clip.frames), self.frames or len(clip.frames)
        if total < count:
            raise UserError(f"it has {total} frames, {count} are measured")
        start = {"first": 0, "middle": (total - count) // 2}.get(self.start)
        if start is None:
            start = int(make_generator(seed, "start of a measured clip", number).integers(total - count + 1))
        frames = clip.frames[start : start + count]
        if self.size not in (None, frames.shape[1:3]):
            frames = np.stack([self._resize(frame) for frame in frames])
        return replace(clip, frames=np.ascontiguousarray(self._cut(frames)))

    def _cut(self, frames: np.ndarray) -> np.ndarray:
        """Return the frames, cut to a multiple of the size step.

        Raises:
          UserError: If the frames are smaller than one step.
        """
        t, *steps = self.multiple
        if min(frames.shape[1] // steps[0], frames.shape[2] // steps[1]) < 1:
            raise UserError(f"its {frames.shape[1]}x{frames.shape[2]} pixels are less than {steps[0]}x{steps[1]}")
        slices = [slice(1 + (len(frames) - 1) // t * t)]
        for length, step in zip(frames.shape[1:3], steps, strict=True):
            margin = length % step
            slices.append(slice(margin // 2, length - (margin - margin // 2)))
        return frames[tuple(slices)]

    def _resize(self, frame: np.ndarray) -> np.ndarray:
        assert self.size is not None
        (height, width), (rows, columns) = self.size, frame.shape[:2]
        scale = min(rows / height, columns / width)
        half_height, half_width = scale * height / 2, scale * width / 2
        box = (columns / 2 - half_width, rows / 2 - half_height, columns / 2 + half_width, rows / 2 + half_height)
        method = Image.Resampling[self.filter.upper()]
        return np.asarray(Image.fromarray(frame).resize((width, height), method, box=box))


class EvaluationData(NamedTuple):
    """Clips that a model is evaluated on."""

    clips: ClipSet
    """Clips of a folder, rendered scenes, or the held-out clips of a run at their training sizes."""
    training: ClipSet | None = None
    """Clips that the model was trained on, if they are known."""
    linear: Callable[[], LinearAutoencoder | None] = lambda: None
    """Returns a linear autoencoder with as many latent values as the trained one, if any, as a baseline."""


class EvaluationItem(NamedTuple):
    """A sample to generate, as a request or a task, and the reference that metrics compare it with."""

    entry: Request | TaskEntry
    """A prompt with its size and seed, or a task."""
    read_reference: Callable[[], Clip] | None = None
    """Returns the clip of the data, in the sample's size, whose caption the prompt is; None if there is none."""
    truth: Any = None
    """True content of the reference, if it is rendered: a value that only metrics for such data read."""
    is_trained_caption: bool = False
    """True if the prompt belongs to a training clip."""


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """Configuration of an evaluation: the samples to generate, by default one per caption of the data, and the metrics.

    A subclass may render its own data (`make_data`) and choose the samples (`make_items`).

    Raises:
      UserError: If two metrics have a value of the same name, one needs data that the protocol lacks, a number of clips
        is below 1, the seed is negative, or `max_unreadable` is outside [0, 1].
    """

    name: str
    """Name in reports."""
    metrics: tuple[Metric, ...]
    """Metrics to compute."""
    clips: ClipSampling = ClipSampling()
    """Frames that are measured, in samples and in data clips."""
    count: int | None = None
    """Number of samples; None for one per data clip."""
    real_count: int | None = None
    """Number of data clips; None for all."""
    split: str = ""
    """Split of the data; all of its clips if empty."""
    background: str = "black"
    """Colour behind transparent pixels of the data, as in `DataConfig`: that with which the model was trained."""
    codec: Literal["mp4", "webm", "apng"] = "mp4"
    """Format of the sample files, which measurements read; apng is lossless, and images are png."""
    crf: int | None = 10
    """Quality of the sample files, 0 (best) to 51; None for the default quality of written clips."""
    seed: int = 0
    """Seed of samples, positions in longer clips, and the choice of clips."""
    max_unreadable: float = 0.01
    """Largest share of clips that may be unreadable or too short; these are named in the result."""
    is_reconstruction: ClassVar[bool] = False
    """True if the autoencoder's reconstructions of the data are measured in the place of samples."""
    may_only_sample: ClassVar[bool] = False
    """True if samples are wanted even without data or where no metric can be computed, as at the end of a training."""
    provides: ClassVar[frozenset[str]] = frozenset(get_args(MetricInput))
    """Data that metrics may need."""
    example_prompts: ClassVar[tuple[str, ...]] = ()
    """Prompts to try models with whose config has none."""

    def __post_init__(self):
        names = Counter(name for metric in self.metrics for name in metric.describe())
        if twice := [name for name, count in names.items() if count > 1]:
            raise UserError(f"metrics are invalid: two have a value {twice[0]!r}. Leave one out, or rename its value.")
        for metric in self.metrics:
            lacking = sorted({*metric.needs} - self.provides)
            if lacking or {*metric.needs} <= {"pipeline"}:
                rule = f"{type(self).__name__} has no {lacking[0]}" if lacking else "its needs name no examples"
                raise UserError(
                    f"metric {type(metric).__name__} is invalid: {rule}. Leave it out, or change its needs."
                )
        check_at_least(1, count=self.count or 1, real_count=self.real_count or 1)
        check_at_least(0, seed=self.seed)
        if not 0 <= self.max_unreadable <= 1:
            raise UserError(f"max_unreadable={self.max_unreadable} is invalid: it is a share. Use 0 to 1")

    def make_data(self, data: EvaluationData | None) -> EvaluationData:
        """Return the clips of the data: by default the given ones.

        Raises:
          UserError: If none are given, and the protocol may not only sample.
        """
        if data is not None:
            return data
        if self.may_only_sample:
            return EvaluationData(NO_CLIPS)
        raise UserError(f"the protocol {self.name} needs clips of the data. Name their folder with --data")

    def make_items(self, pipeline: Pipeline, data: EvaluationData) -> list[EvaluationItem]:
        """Return what is generated: by default, for metrics of samples, a clip for each caption of the data.

        A clip has the size that the data names, or the model's own height and width and enough frames for the
        measurement. A model that always has a first frame gets that of the data.

        Args:
          pipeline: The model. Before a training it has no weights, but its config, and clips as their reconstructions.
          data: Clips of the data, of `make_data`.

        Raises:
          UserError: If clips have no captions, or the model cannot generate a size.
        """
        if not any("samples" in metric.needs for metric in self.metrics):
            return []
        config, clips = pipeline.config, data.clips
        if lacking := [name for name, caption in zip(clips.names, clips.captions, strict=True) if not caption]:
            raise UserError(
                f"{len(lacking)} of {len(clips.names)} clips of {clips.location} have no caption, such as "
                f"{lacking[0]}. Give them captions, or evaluate a folder of samples"
            )
        chosen = self.choose(len(clips.names), self.count, purpose="prompts")
        numbers = [chosen[index] for index in self.repeat_captions(len(chosen))]
        stride = config.model.autoencoder.stride.t
        frames = self.clips.frames or config.size.t
        size = config.size._replace(t=1 + -(-(frames - 1) // stride) * stride)
        seeds = make_generator(self.seed, "seeds of samples").integers(2**32, size=len(numbers)).tolist()
        return [
            make_caption_item(pipeline, clips, number, seed=seed, size=size)
            for number, seed in zip(numbers, seeds, strict=True)
        ]

    def choose(self, total: int, count: int | None, *, purpose: str) -> list[int]:
        """Return the numbers of the clips to use, in order: all, or `count` different ones at random."""
        if count is None or count >= total:
            return list(range(total))
        return sorted(make_generator(self.seed, purpose).choice(total, count, replace=False).tolist())

    def repeat_captions(self, captions: int) -> list[int]:
        """Return the caption number of each sample: every caption as often as another, give or take one."""
        count = captions if self.count is None else self.count
        rounds = math.ceil(count / max(1, captions))
        return [number for _ in range(rounds) for number in range(captions)][:count]


@dataclass(frozen=True, kw_only=True)
class ReconstructionProtocol(EvaluationProtocol):
    """Reconstructions of the data by the autoencoder, which take the place of samples."""

    is_reconstruction = True

    def make_items(self, pipeline: Pipeline, data: EvaluationData) -> list[EvaluationItem]:
        """Return nothing, since nothing is sampled."""
        return []


def needs_first_frame(pipeline: Pipeline) -> bool:
    """Return whether the model always has a first frame."""
    frames = pipeline.config.model.frame_conditioning
    return frames is not None and frames.is_required


def make_caption_item(pipeline: Pipeline, clips: ClipSet, number: int, *, seed: int, size: Grid) -> EvaluationItem:
    """Return the item of a clip's caption, with the clip as reference and with its first frame if the model needs one.

    Args:
      pipeline: The model.
      clips: Clips of the data.
      number: Number of the clip.
      seed: Seed of the sample.
      size: Size of the sample, if the data does not name its own.

    Raises:
      UserError: If the model cannot generate the size.
    """
    read = partial(clips.read, number, None)
    image = read().frames[0] if needs_first_frame(pipeline) else None
    request = Request(clips.captions[number], clips.get_size(number) if clips.get_size else size, seed, image=image)
    pipeline.config.model.latent_grid(pipeline.config.resolve_size(request))
    return EvaluationItem(request, read, clips.truths[number] if clips.truths else None)


def make_item_seed(seed: int, number: int) -> int:
    """Return a seed that differs between the items of an evaluation, and between evaluations."""
    return (1000 * seed + number) % 2**32


def check_comparable(first: Mapping[str, Any], second: Mapping[str, Any], *, names: tuple[str, str]) -> None:
    """Check that two recorded protocols are equal, so that their figures may be compared.

    Args:
      first: `protocol` of one result's `metrics.json`.
      second: `protocol` of the other's.
      names: Names of the results in the message.

    Raises:
      UserError: If the protocols differ; the message names the fields.
    """
    old, new = (config_json.rewrite(dict(each)) for each in (first, second))
    if difference := config_json.describe_difference(old, new, "protocol"):
        raise UserError(
            f"{names[0]} and {names[1]} are not comparable: {difference} (there: {names[0]}). "
            "Evaluate both with one protocol"
        )
