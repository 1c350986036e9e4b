"""What is looked at while a run's denoiser is trained: the loss of held-out clips, clips of the model, its speed."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dit_video.backbones.dit import DitConfig
from dit_video.backbones.flops import training_flops
from dit_video.core.errors import UserError
from dit_video.data.clips import ClipSource
from dit_video.data.latents.online import LiveEncoder
from dit_video.distributed import make_mesh, shard_batch
from dit_video.encoders.text import FrozenEncoder
from dit_video.experiment import DenoiserTraining, Experiment, input_pipeline
from dit_video.experiment.initialization import TrainedDenoiser
from dit_video.nn.attention import Full
from dit_video.pipelines.pipeline import Pipeline, Request
from dit_video.text import Tokenizer
from dit_video.tokens import Grid, Rows
from dit_video.training.hooks.writers import Log, Monitoring, TensorBoard, WeightsAndBiases
from dit_video.training.loop import Periodic
from dit_video.training.losses.denoiser import DenoiserLoss
from dit_video.training.optim.ema import DECAY, name_of
from dit_video.training.optim.posthoc_ema import Snapshots
from dit_video.training.state import on_host
from dit_video.training.step import Ratio
from dit_video.video import Clip

_CLIPS = 4
"""in a grid of samples whose prompts the config doesn't give"""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A denoiser's training, and what is needed to look at it."""

    experiment: Experiment
    folder: Path
    """of the training"""
    loss: DenoiserLoss
    trained: TrainedDenoiser
    clips: ClipSource
    """that are trained on"""
    held_out: Callable[[], ClipSource]
    tokenizer: Callable[[], Tokenizer | FrozenEncoder]
    autoencoder: Callable[[], dict[str, Any]]
    """its parameters"""
    pipeline: Callable[[dict[str, Any]], Pipeline]
    """of the denoiser's weights"""

    def arguments(self) -> dict[str, Any]:
        """Of `Training`, as the config says.

        Raises:
          MissingError: a package that figures go to is not installed.
          UserError: no clips are held out to validate on.
        """
        monitoring, periodic = self.experiment.monitoring, []
        if monitoring.validate_every:
            periodic.append(
                validation(
                    self.experiment, self.held_out(), self.tokenizer(), self.autoencoder(), self.loss, self.trained
                )
            )
        if monitoring.sample_every:
            captions = [info.captions[0] for info in self.clips.infos if info.captions]

            def pipeline(averaged: dict[str, Any]) -> Pipeline:
                return self.pipeline(self.trained.whole(averaged))

            periodic.append(samples(self.folder / "samples", monitoring, captions, pipeline))
        return {
            "logs": logs(monitoring, self.folder),
            "periodic": tuple(periodic),
            "work": work_of(self.experiment.denoiser),
        }


def logs(monitoring: Monitoring, folder: Path) -> tuple[Log, ...]:
    """Where figures go besides the JSON lines, in the folder of a training.

    Raises:
      MissingError: a package that is not installed.
    """
    found: list[Log] = []
    if jax.process_index() == 0:
        if monitoring.tensorboard:
            found.append(TensorBoard(folder / "tensorboard"))
        if monitoring.wandb is not None:
            found.append(WeightsAndBiases(monitoring.wandb, folder))
    return tuple(found)


def validation(
    experiment: Experiment,
    clips: ClipSource,
    tokenizer: Tokenizer | FrozenEncoder,
    autoencoder: dict[str, Any],
    loss: DenoiserLoss,
    trained: TrainedDenoiser,
) -> Periodic:
    """The loss of the first batches of held-out clips, with the averaged weights.

    Args:
      experiment: the config.
      clips: those held out.
      tokenizer: of their captions.
      autoencoder: its parameters.
      loss: what training minimises.
      trained: whether that is of weights or of adapters to some.

    Raises:
      UserError: no clips are held out.
    """
    if not len(clips.infos):
        raise UserError("no clips are held out to validate on; name some in data held_out, or leave out validate_every")
    data = dataclasses.replace(experiment.data, weights=(), workers=0)
    alone = dataclasses.replace(experiment, data=data)
    texts = input_pipeline.texts_of(tokenizer, [info.captions for info in clips.infos])
    encode: LiveEncoder = input_pipeline.live_encoder(alone, autoencoder, clips)
    with contextlib.closing(input_pipeline.live(alone, clips, texts, encode)(0)) as batches:
        rows = list(itertools.islice(batches, experiment.monitoring.validation_batches))
    fixed = trained.loss(dataclasses.replace(loss, caption_dropout=0.0))
    assert callable(fixed)
    mesh, constants = make_mesh(experiment.mesh), () if trained.adapted is None else (trained.adapted,)

    @jax.jit
    def judged(params, batch, *constants):
        value, figures = fixed(params, batch, jnp.zeros((), jnp.int32), *constants)
        return Ratio(value * loss.weight(batch), loss.weight(batch)), {
            name: figure for name, figure in figures.items() if name.startswith("loss_")
        }

    def call(_done: int, state: Any) -> dict[str, float]:
        totals: dict[str, np.ndarray] = {}
        for batch in rows:
            whole, parts = jax.device_get(judged(state.ema, shard_batch(batch, mesh), *constants))
            for name, ratio in {"loss": whole, **parts}.items():
                totals[name] = totals.get(name, np.zeros(2)) + np.asarray(ratio, np.float64)
        return {f"validation_{name}": float(total / count) for name, (total, count) in totals.items() if count}

    return Periodic(every=experiment.monitoring.validate_every, call=call)


def samples(
    folder: Path, monitoring: Monitoring, captions: Sequence[str], pipeline: Callable[[Any], Pipeline]
) -> Periodic:
    """A grid of clips at the training size, in `folder`; by the same prompts and seeds each time.

    Args:
      folder: where files go, by step.
      monitoring: its prompts.
      captions: the prompts where it has none.
      pipeline: from averaged weights on the host.
    """
    prompts = monitoring.prompts or tuple(captions[:_CLIPS])

    def call(done: int, state: Any) -> dict[str, float]:
        averaged = on_host(state.ema)
        if jax.process_index() == 0:
            made = pipeline(averaged)
            requests = [Request(prompt, made.config.size, seed=seed) for seed, prompt in enumerate(prompts)]
            clips = made.generate_many(requests)
            folder.mkdir(parents=True, exist_ok=True)
            sheet(clips).save(folder / f"{done:08}.{'mp4' if made.config.size.t > 1 else 'png'}")
        return {}

    return Periodic(every=monitoring.sample_every, call=call)


def work_of(config: DenoiserTraining) -> Callable[[Rows], float] | None:
    """Operations of a step of the denoiser, by its rows, as utilisation counts them; None for a student.

    Padding counts for nothing.
    """
    if config.distillation is not None:
        return None
    dit, adapters = config.dit, config.lora is not None
    gridded = dit.patterns != (Full(),) if isinstance(dit, DitConfig) else False

    def work(rows: Rows) -> float:
        clips: list[Any] = []
        texts: list[int] = []
        images: list[int] = []
        each = zip(rows.segments, rows.coordinates, rows.text_segments, rows.image_segments, strict=True)
        for segments, places, text, image in each:
            numbers = np.bincount(segments)[1:]
            clips += [grid_of(places[segments == i + 1]) for i in range(len(numbers))] if gridded else numbers.tolist()
            for found, of in ((texts, text), (images, image)):
                found += np.bincount(of, minlength=len(numbers) + 1)[1:].tolist()
        return float(training_flops(dit, clips, texts, images=images, adapters=adapters))

    return work


def grid_of(places: Float[np.ndarray, "n 3"]) -> Grid:
    """Of the tokens of a clip, by their coordinates."""
    return Grid(*(len(np.unique(axis)) for axis in places.T))


def sheet(clips: Sequence[Clip], *, gap: int = 2) -> Clip:
    """Clips of one size side by side, in as many lines as columns or one less."""
    columns = math.ceil(math.sqrt(len(clips)))
    lines = math.ceil(len(clips) / columns)
    frames, height, width, _ = clips[0].frames.shape
    whole = np.full((frames, lines * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, clip in enumerate(clips):
        line, column = divmod(number, columns)
        top, left = line * (height + gap), column * (width + gap)
        whole[:, top : top + height, left : left + width] = clip.frames
    # Video formats want even sizes.
    return Clip(np.pad(whole, ((0, 0), (0, whole.shape[1] % 2), (0, whole.shape[2] % 2), (0, 0))), clips[0].fps)


def averaged(
    state: Any, config: DenoiserTraining, folder: Path, *, ema: float | int | None, sigma_rel: float | None
) -> dict[str, Any]:
    """The weights of a training that are asked for, on the host: those of one of its averages.

    Args:
      state: the newest.
      config: which averages it has.
      folder: of its snapshots.
      ema: a decay; 0 for the weights without an average; None for the one that is sampled from.
      sigma_rel: instead of it the width of an average that is put together from snapshots.

    Raises:
      MissingError: there are no snapshots.
      UserError: a decay that was not kept, or both.
    """
    if ema is not None and sigma_rel is not None:
        raise UserError("an average has a decay or a relative width: give ema or sigma_rel")
    if sigma_rel is not None:
        shapes = jax.eval_shape(lambda: state.params)
        return Snapshots(folder / "snapshots").reconstruct(sigma_rel, like=shapes, last=int(state.step))
    if ema is None or ema == config.ema_decay:
        return on_host(state.ema)
    if ema == 0:
        return on_host(state.params)
    if ema not in config.averages.decays:
        known = ", ".join(map(str, (config.ema_decay, *config.averages.decays)))
        raise UserError(f"the run keeps no average of decay {ema}; use {known}, or 0 for the weights themselves")
    return on_host(state.averages[DECAY][name_of(ema)])
