"""Speed of training steps on random latents and pixels."""

import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.settings import Setting, SyntheticBatches, tokenize_bytes
from dit_video.core import rng
from dit_video.core.trees import count_values as count
from dit_video.diffusion import FlowMatching
from dit_video.distributed import make_mesh, make_shardings, shard_batch
from dit_video.models.autoencoders import latent_grid
from dit_video.models.model_config import ModelConfig
from dit_video.nn import get_graph_def, init_params
from dit_video.training.losses.autoencoder import AutoencoderLoss
from dit_video.training.losses.denoiser import DenoiserLoss
from dit_video.training.optim.optimizer import OptimizerConfig
from dit_video.training.state import TrainState, init_state, make_on_devices
from dit_video.training.step import GradientStep, Loss, StepFn

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_SCHEDULE_STEPS = 100_000
"""Number of steps of the learning rate schedule, which does not affect its cost."""


@contextlib.contextmanager
def count_compilations() -> Iterator[Callable[[], int]]:
    """Yield a function that counts the programs XLA has compiled since the block was entered."""
    compiled = 0

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        nonlocal compiled
        compiled += event == _COMPILE_EVENT

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class TrainingSetup(NamedTuple):
    """A training step, its latest state and the function that places a batch on devices."""

    step: StepFn
    state: TrainState
    place_batch: Callable[[Any], Any]


def make_training_setup(setting: Setting, init: Callable, loss: Loss, config: OptimizerConfig) -> TrainingSetup:
    """Initialize a model on the mesh."""
    mesh = make_mesh(setting.parallel)
    optimizer = config.make(steps=_SCHEDULE_STEPS + config.schedule.warmup)
    layout = functools.partial(make_shardings, mesh=mesh)
    random_key = rng.key(0, "benchmark")
    state = make_on_devices(lambda key: init_state(init(key), optimizer), random_key, shardings=layout)
    jax.block_until_ready(state)
    step = GradientStep(loss=loss, optimizer=optimizer, ema_decay=0.999).compile()
    return TrainingSetup(step, state, functools.partial(shard_batch, mesh=mesh))


def time_steps(setup: TrainingSetup, batches: Sequence[Any], steps: int) -> tuple[dict[str, Any], TrainingSetup]:
    """Compile, warm up and time `steps` steps on batches that are on the device already."""
    step, state = setup.step, setup.state
    placed = [setup.place_batch(batch) for batch in batches]
    jax.block_until_ready(placed)
    with count_compilations() as compiled:
        start_time = time.perf_counter()
        state, metrics = step(state, placed[0])
        jax.block_until_ready(metrics)
        first = time.perf_counter() - start_time
        for batch in placed[1:3]:
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        start_time = time.perf_counter()
        for number in range(steps):
            state, metrics = step(state, placed[number % len(placed)])
        jax.block_until_ready((state, metrics))
        seconds = (time.perf_counter() - start_time) / steps
        total = compiled()
    figures = {
        "parameters": count(state.params),
        "step_ms": round(1000 * seconds, 3),
        "steps": steps,
        "first_step_seconds": round(first, 2),
        "compilations": total,
        "loss": float(metrics["loss"]),
    }
    return figures, setup._replace(state=state)


def make_denoiser_parts(setting: Setting) -> tuple[Callable, DenoiserLoss, OptimizerConfig]:
    """Return the init function, the loss and the optimizer config of the denoiser with its text encoder."""
    model: ModelConfig = setting.model
    loss = DenoiserLoss(
        backbone=get_graph_def(model.backbone.make),
        text_encoder=get_graph_def(model.text_encoder.make),
        objective=FlowMatching(process=model.process, prediction=model.prediction),
        caption_dropout=0.1,
        empty_caption=tokenize_bytes(model.text_encoder, ""),
        seed=0,
    )

    def init(key):
        first, second = jax.random.split(key)
        return {
            "backbone": init_params(model.backbone.make, first),
            "text": init_params(model.text_encoder.make, second),
        }

    return init, loss, setting.denoiser.optimizer


def measure_denoiser(setting: Setting, steps: int, num_examples: int) -> tuple[dict[str, Any], TrainingSetup]:
    """Measure the packed training step of the denoiser with its text encoder."""
    config = setting.denoiser
    packed = SyntheticBatches(setting, num_examples)
    batches = list(itertools.islice(packed, 8))
    figures, setup = time_steps(make_training_setup(setting, *make_denoiser_parts(setting)), batches, steps)
    tokens = config.batch * setting.model.row_shape.tokens
    real = float(np.mean([(batch.segments > 0).sum(axis=(0, 1)) for batch in batches]))
    figures |= {
        "tokens_per_step": tokens,
        "tokens_per_second": round(1000 * tokens / figures["step_ms"]),
        "tokens_per_second_without_padding": round(1000 * real / figures["step_ms"]),
        "sizes": packed.num_sizes,
        "padding_share": round(packed.padding, 4),
        "peak_memory": get_peak_memory(),
    }
    return figures, setup


def measure_autoencoder(setting: Setting, steps: int) -> tuple[dict[str, Any], TrainingSetup]:
    """Measure the autoencoder's training step on windows of pixels; its tokens are latent positions."""
    config, model, window = setting.autoencoder, setting.model.autoencoder, setting.autoencoder.windows[0]
    loss = AutoencoderLoss(
        graph=get_graph_def(model.make), objective=config.loss, latents=model.make_loss(config.loss), seed=0
    )
    setup = make_training_setup(setting, functools.partial(init_params, model.make), loss, config.optimizer)
    generator = rng.make_generator(0, "benchmark windows")
    batches = [generator.integers(0, 256, (window.batch, *window.size, 3), dtype=np.uint8) for _ in range(2)]
    figures, setup = time_steps(setup, batches, steps)
    latents = latent_grid(window.size, model.stride)
    figures |= {
        "windows": f"{window.batch} of {'x'.join(map(str, window.size))}",
        "tokens_per_second": round(1000 * window.batch * latents.volume / figures["step_ms"]),
        "pixels_per_second": round(1000 * window.batch * window.size.volume / figures["step_ms"]),
        "peak_memory": get_peak_memory(),
    }
    return figures, setup


def get_peak_memory() -> dict[str, Any]:
    """Return the peak memory in bytes, of the first device if it reports that, else of this process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return {"of": "device", "bytes": int(statistics["peak_bytes_in_use"])}
    import resource  # not available on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return {"of": "process", "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
