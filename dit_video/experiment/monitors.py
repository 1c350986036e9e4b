"""Monitoring of a training: the loss of held-out clips, samples and their evaluation, reconstructions, throughput."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.core.errors import DecodeError
from dit_video.core.files import write_json
from dit_video.data.clips import ClipSource
from dit_video.data.latents.codec import LatentCodec
from dit_video.data.sizes import SizeLimits, fit_size, read_fitted_clip
from dit_video.distributed import shard_batch
from dit_video.distributed.gather import is_first_process, to_host
from dit_video.distributed.processes import wait_for_main_process
from dit_video.evaluation.evaluate import evaluate_in_background
from dit_video.evaluation.measure import EvaluationResult
from dit_video.evaluation.metrics.reconstruction import compute_limited_psnr
from dit_video.evaluation.protocol import EvaluationData, EvaluationProtocol
from dit_video.experiment import input_pipeline
from dit_video.experiment.denoiser import TrainableDenoiser
from dit_video.experiment.run import Run
from dit_video.experiment.training_config import DenoiserTraining, Student
from dit_video.models.autoencoders import AutoencoderConfig
from dit_video.models.backbones.flops import count_training_flops
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.conditioning import IMAGE_TOKENS
from dit_video.sampling.pipeline import Pipeline, Request
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.tokens import PackedBatch, infer_grid
from dit_video.training.hooks.hook import Hook, PeriodicCall
from dit_video.training.hooks.metric_logs import MonitoringConfig, TensorBoard, WeightsAndBiases
from dit_video.training.losses.denoiser import DenoiserLoss, LoraLoss
from dit_video.training.step import Average
from dit_video.video import Clip

_MAX_CLIPS = 4
"""Number of clips in a grid of reconstructions, or of samples whose prompts the config does not give."""
_MAX_CANDIDATES = 1000
"""Number of clips from which a grid of reconstructions is selected."""
_GAP = 2
"""Pixels between the clips of a grid."""
TILES_FILE = "tiles.json"
"""Name of the file that says where the clips of the grids in its folder lie."""


def open_logs(monitoring: MonitoringConfig, folder: Path) -> list[Hook]:
    """Open the logs other than the JSON lines, in the folder of a training.

    Raises:
      MissingError: If a package is not installed.
      UserError: If Weights & Biases is not logged in.
    """
    logs: list[Hook] = []
    if jax.process_index() == 0:  # the others need not have the packages, nor the time to import them
        if monitoring.tensorboard:
            logs.append(TensorBoard(folder / "tensorboard"))
        if monitoring.wandb is not None:
            logs.append(WeightsAndBiases(monitoring.wandb, folder))
    return logs


def make_validation(
    run: Run, training: DenoiserTraining, loss: DenoiserLoss, trained: TrainableDenoiser
) -> PeriodicCall:
    """Return a hook that computes the loss of the first batches of held-out clips, with the averaged weights.

    Args:
      run: The run, as the stage of the training sees it.
      training: The training.
      loss: The training loss.
      trained: The trained part of the denoiser: weights or adapters.
    """
    clips, mesh, monitoring = run.held_out_clips, run.mesh, run.experiment.monitoring
    data = dataclasses.replace(run.data, weights=(), workers=0)
    validated = dataclasses.replace(run, adapted=run.adapted._replace(data=data))
    captions = input_pipeline.open_captions(run.open_text_encoder(cache=run.folder / "texts"), clips)
    encode = input_pipeline.make_online_encoder(validated, training, run.read_autoencoder(), clips)
    source = input_pipeline.make_clip_examples(validated, clips, captions, encode)
    with contextlib.closing(input_pipeline.open_rows(validated, training, source, clips)(0)) as rows:
        batches = list(itertools.islice(rows, monitoring.validation_batches))
    undropped = dataclasses.replace(loss, caption_dropout=0.0, is_training=False)
    eval_loss = undropped if trained.lora is None else LoraLoss(loss=undropped, scale=trained.lora.scale)
    constants = () if trained.base_params is None else (trained.base_params,)

    @jax.jit
    def evaluate(params, batch, *constants):
        value, details = eval_loss(params, batch, jnp.zeros((), jnp.int32), *constants)
        parts = {name: metric for name, metric in details.metrics.items() if name.startswith("loss_")}
        assert details.num_examples is not None  # the loss of a denoiser counts its clips
        return Average(value * details.num_examples, details.num_examples), parts

    def call(_done: int, state: Any) -> dict[str, float]:
        totals: dict[str, np.ndarray] = {}
        for batch in batches:
            total_ratio, parts = jax.device_get(evaluate(state.ema, shard_batch(batch, mesh), *constants))
            for name, ratio in {"loss": total_ratio, **parts}.items():
                totals[name] = totals.get(name, np.zeros(2)) + np.asarray(ratio, np.float64)
        return {f"validation_{name}": float(total / count) for name, (total, count) in totals.items() if count}

    return PeriodicCall(every=monitoring.validate_every, function=call, name="validate")


def make_sample_requests(monitoring: MonitoringConfig, clips: ClipSource, config: PipelineConfig) -> list[Request]:
    """Return what is sampled for a grid: the config's prompts, or captions of the first clips, or no text."""
    captions = (info.captions[0] for info in clips.infos if info.captions)
    prompts = monitoring.prompts or tuple(itertools.islice(captions, _MAX_CLIPS)) or ("",) * _MAX_CLIPS
    return [Request(prompt, config.size, seed=seed) for seed, prompt in enumerate(prompts)]


def make_sampling(
    folder: Path, monitoring: MonitoringConfig, requests: Sequence[Request], pipeline: Callable[[Any], Pipeline]
) -> PeriodicCall:
    """Return a hook that saves a grid of clips at the training size, with the same prompts and seeds each time.

    Args:
      folder: Folder of the files, named by step, and of `TILES_FILE`.
      monitoring: Holds the interval.
      requests: What is sampled, see `make_sample_requests`.
      pipeline: Returns a pipeline from averaged weights, which stay where they are on the devices.
    """

    def call(done: int, state: Any) -> dict[str, float]:
        model = pipeline(state.ema)
        samples = model.sample_many(requests)
        if is_first_process():
            _save_grid(folder, done, model.decode_many(samples), [request.prompt for request in requests])
        wait_for_main_process()
        return {}

    return PeriodicCall(every=monitoring.sample_every, function=call, name="sample")


def make_reconstructions(
    folder: Path, monitoring: MonitoringConfig, model: AutoencoderConfig, clips: ClipSource, limits: SizeLimits
) -> PeriodicCall:
    """Return a hook that saves a grid of clips, each next to its reconstruction, and computes their mean PSNR.

    Args:
      folder: Folder of the files, named by step, and of `TILES_FILE`.
      monitoring: Holds the interval.
      model: Config of the autoencoder.
      clips: Clips to reconstruct: the first ones of the most common size are.
      limits: Limits of the sizes at which they are read.
    """

    @functools.cache
    def read() -> list[tuple[str, Clip]]:
        return _read_alike(clips, limits)

    def call(done: int, state: Any) -> dict[str, float]:
        codec = LatentCodec(model, to_host(state.ema))
        values = {}
        if is_first_process() and (named := read()):
            pairs = [(clip, codec.reconstruct(clip)) for _, clip in named]
            _save_grid(folder, done, [_join(*pair) for pair in pairs], [name for name, _ in named])
            psnrs = [compute_limited_psnr(original.frames, decoded.frames) for original, decoded in pairs]
            values["reconstruction_psnr"] = float(np.mean(psnrs))
        wait_for_main_process()
        return values

    return PeriodicCall(every=monitoring.sample_every, function=call, name="reconstruct")


def _read_alike(clips: ClipSource, limits: SizeLimits) -> list[tuple[str, Clip]]:
    """Return the names and frames of up to `_MAX_CLIPS` clips of one size, without those that cannot be decoded."""
    sizes = [fit_size(info, limits) for info in clips.infos[:_MAX_CANDIDATES]]
    counts = Counter(sizes)
    size = max(counts, key=lambda each: (min(counts[each], _MAX_CLIPS), each.t > 1, counts[each], each))
    result = []
    for index in (index for index, each in enumerate(sizes) if each == size):
        with contextlib.suppress(DecodeError):
            result.append((clips.infos[index].name, read_fitted_clip(clips, index, limits)))
        if len(result) == _MAX_CLIPS:
            break
    return result


def _join(original: Clip, decoded: Clip) -> Clip:
    gap = np.full((*original.frames.shape[:2], _GAP, 3), 255, np.uint8)
    return dataclasses.replace(original, frames=np.concatenate([original.frames, gap, decoded.frames], axis=2))


def _save_grid(folder: Path, step: int, clips: Sequence[Clip], texts: Sequence[str]) -> None:
    """Write a grid of clips of one size, and where each of them lies in it, with a text for each."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = tile_clips(clips)
    grid.save(folder / f"{step:08}.{'mp4' if len(grid.frames) > 1 else 'png'}")
    columns, (height, width) = _count_columns(len(clips)), clips[0].frames.shape[1:3]
    tiles = [
        {"text": text, "left": column * (width + _GAP), "top": line * (height + _GAP)}
        for text, (line, column) in zip(texts, (divmod(number, columns) for number in range(len(clips))), strict=True)
    ]
    sizes = {"height": grid.height, "width": grid.width, "tile_height": height, "tile_width": width}
    write_json(folder / TILES_FILE, {**sizes, "tiles": tiles})


def make_flops_fn(training: DenoiserTraining, backbone: BackboneConfig) -> Callable[[PackedBatch], float] | None:
    """Return a function from rows to the FLOPs of the denoiser's step, for utilisation; None for a student.

    Padding does not count.
    """
    if isinstance(training.train, Student):
        return None
    adapters = training.lora is not None

    def work(rows: PackedBatch) -> float:
        clips, text_lengths, images = list[Any](), list[int](), list[int]()
        tokens = rows.fields[IMAGE_TOKENS].shape[1] // rows.layout.count if IMAGE_TOKENS in rows.fields else 0
        for segments, positions, text in zip(rows.segments, rows.positions, rows.text_segments, strict=True):
            lengths = np.bincount(segments)[1:]
            ids = range(1, len(lengths) + 1)
            clips += [infer_grid(positions[segments == i]) for i in ids] if backbone.needs_grids else lengths.tolist()
            text_lengths += np.bincount(text, minlength=len(lengths) + 1)[1:].tolist()
            images += [tokens] * len(lengths)
        return float(count_training_flops(backbone, clips, text_lengths, images=images, adapters=adapters))

    return work


def tile_clips(clips: Sequence[Clip], *, gap: int = _GAP) -> Clip:
    """Tile clips of one size, in as many lines as columns or one fewer."""
    columns = _count_columns(len(clips))
    lines = math.ceil(len(clips) / columns)
    frames, height, width, _ = clips[0].frames.shape
    canvas = np.full((frames, lines * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, clip in enumerate(clips):
        line, column = divmod(number, columns)
        top, left = line * (height + gap), column * (width + gap)
        canvas[:, top : top + height, left : left + width] = clip.frames
    # Video formats need even sizes.
    return Clip(np.pad(canvas, ((0, 0), (0, canvas.shape[1] % 2), (0, canvas.shape[2] % 2), (0, 0))), clips[0].fps)


def _count_columns(clips: int) -> int:
    return math.ceil(math.sqrt(clips))


class EvaluationHook(Hook):
    """Evaluations of the averaged weights at an interval of steps, in `step_STEP/`.

    All processes sample together. The first one decodes and measures in a thread of its own, for which neither the
    others nor the training wait; the values are logged with the next entry after they are known, and the last entry
    waits for them. Metrics that need the denoiser itself are left out, since its weights go on changing.

    Args:
      folder: Folder of the evaluations.
      every: Interval in steps.
      protocol: What is sampled and measured.
      data: Clips of the training.
      make_pipeline: Returns a pipeline from averaged weights, which stay where they are on the devices.
    """

    name = "evaluate"

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        protocol: EvaluationProtocol,
        data: EvaluationData,
        make_pipeline: Callable[[Any], Pipeline],
    ):
        self._folder, self._every, self._protocol, self._data = folder, every, protocol, data
        self._make_pipeline = make_pipeline
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evaluation")
        self._pending: dict[int, Future[EvaluationResult]] = {}
        self._is_last = False

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Return True at the interval; after the last step the run is evaluated as a whole."""
        self._is_last = is_last
        return step % self._every == 0

    def call(self, step: int, state: Any) -> Mapping[str, float]:
        """Sample, and let the first process measure."""
        pipeline, folder = self._make_pipeline(state.ema), self._folder / f"step_{step}"
        measured = evaluate_in_background(pipeline, self._protocol, folder, self._executor, data=self._data)
        if measured is not None:
            self._pending[step] = measured
        return {}

    def derive(self, values: Mapping[str, float]) -> Mapping[str, float]:
        """Return the values of the evaluations that have ended since the entry before, or of all after the last step.

        Raises:
          UserError: If an evaluation has failed.
        """
        derived: dict[str, float] = {}
        for step in [step for step, each in self._pending.items() if each.done() or self._is_last]:
            results = self._pending.pop(step).result().results
            known = {name: each.estimate.value for name, each in results.items() if each.estimate.value is not None}
            derived |= {f"evaluation_{name}": value for name, value in known.items()}
            derived["evaluation_step"] = float(step)
        return derived

    def close(self) -> None:
        """Wait for the evaluations that have not ended."""
        self._executor.shutdown(wait=True)
        for each in self._pending.values():
            each.result()
