"""Speed of a transformer like Wan's, forward and in training, against diffusers' on the same weights and inputs.

All models run in one process, interleaved, in float32, with as many threads as there are cores. The ratio is that of
the medians, against the faster form of the peer.
"""

import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.timer import time_median
from benchmarks.train_step import init_train_state, make_train_step
from dit_video.core import rng
from dit_video.core.trees import count_values as count
from dit_video.families import save_denoiser
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import get_graph_def, get_param_shapes, init_params
from dit_video.tokens import Grid, PackedRows, compute_positions, patchify, unpatchify

TIME = 0.6


@dataclass(frozen=True, kw_only=True)
class WanShape:
    """Shape of a model and of its inputs; the default has 5 latent frames of 24 × 52, which are 1,560 tokens."""

    width: int = 384
    mlp_dim: int = 2240
    """Hidden width of the MLP, in the same proportion as in Wan 2.1 T2V 1.3B."""
    layers: int = 6
    heads: int = 6
    grid: Grid = Grid(5, 12, 26)
    """Grid of tokens."""
    text_tokens: int = 64
    text_width: int = 4096

    def make_config(self) -> WanDitConfig:
        return WanDitConfig(
            width=self.width,
            mlp_dim=self.mlp_dim,
            layers=self.layers,
            heads=self.heads,
            text_length=self.text_tokens,
            context_width=self.text_width,
        )


SMALL = WanShape(width=16, mlp_dim=24, layers=2, heads=2, grid=Grid(2, 3, 4), text_tokens=4, text_width=8)
"""Tiny shape, to try the command."""


class Inputs(NamedTuple):
    """Inputs of a batch of one clip."""

    latents: np.ndarray
    """Noisy latents `[t h w c]`."""
    text: np.ndarray
    """Text embeddings `[s E]`."""
    target: np.ndarray
    """Target of the prediction `[t h w c]`."""


class ModelFunctions(NamedTuple):
    """Functions of one model in one form: prediction `[t h w c]` and a training step, which returns its loss."""

    forward: Callable[[], Any]
    step: Callable[[], Any]
    predict: Callable[[], np.ndarray]


PeerFactory = Callable[[Path, Inputs], dict[str, ModelFunctions]]
"""Function that makes forms of another project's model from a folder of weights in the diffusers layout."""


def measure(shape: WanShape, rounds: int, peer: PeerFactory | None = None) -> dict[str, Any]:
    """Measure seconds of a forward pass and a training step (forward, backward, AdamW), and errors to the peer."""
    config = shape.make_config()
    params = _make_weights(config)
    inputs = _make_inputs(shape)
    calls = {"ours": make_functions(config, params, shape, inputs)}
    if peer is not None:
        with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder:
            # The padded text length is not part of the weights, and diffusers' model accepts any length.
            save_denoiser(folder, replace(config, text_length=512), jax.device_get(params))
            calls |= peer(Path(folder), inputs)
    expected = calls["ours"].predict()
    scale = float(np.abs(expected).max())
    figures: dict[str, Any] = {
        "tokens": shape.grid.volume,
        "parameters": count(params),
        "rounds": rounds,
        "difference": {
            name: float(np.abs(one.predict() - expected).max()) / scale for name, one in calls.items() if name != "ours"
        },
        "forward": _time_models({name: one.forward for name, one in calls.items()}, rounds, "forward"),
    }
    losses = {name: [float(one.step()) for _ in range(3)] for name, one in calls.items()}
    figures["losses"] = losses
    return figures | {
        "training step": _time_models({name: one.step for name, one in calls.items()}, rounds, "training step")
    }


def _time_models(calls: dict[str, Callable[[], Any]], rounds: int, title: str) -> dict[str, Any]:
    seconds = time_median(calls, rounds)
    print(f"{title}: " + ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in seconds.items()), file=sys.stderr)
    figures: dict[str, Any] = {"seconds": {name: round(value, 4) for name, value in seconds.items()}}
    others = [value for name, value in seconds.items() if name != "ours"]
    return figures | ({"ratio": round(seconds["ours"] / min(others), 3)} if others else {})


def _make_weights(config: WanDitConfig) -> dict[str, Any]:
    """Return random weights; a zero-initialized head would hide all differences before it."""
    params = init_params(config.make, rng.key(0, "benchmark model"))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(rng.key(0, "benchmark weights"), len(leaves))
    return jax.tree.unflatten(
        tree, [leaf + 0.02 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )


def _make_inputs(shape: WanShape) -> Inputs:
    draw = rng.make_generator(0, "benchmark inputs")
    patch, grid = shape.make_config().patch, shape.grid
    size = (grid.t * patch.t, grid.h * patch.h, grid.w * patch.w, shape.make_config().channels)
    latents, target = (draw.normal(size=size).astype(np.float32) for _ in range(2))
    return Inputs(latents, draw.normal(size=(shape.text_tokens, shape.text_width)).astype(np.float32), target)


def make_functions(config: WanDitConfig, params: dict[str, Any], shape: WanShape, inputs: Inputs) -> ModelFunctions:
    """Make the functions of our model, on one segment that fills its row; the training state is donated."""
    predict = _make_prediction_fn(config, shape)
    model_inputs = jax.device_put(_make_model_inputs(shape, inputs))
    target = jax.device_put(inputs.target)

    def loss_fn(params: Any, target: jax.Array, model_inputs: Any) -> jax.Array:
        return jnp.square(predict(params, *model_inputs) - target).mean()

    forward, train = jax.jit(predict), make_train_step(loss_fn)
    state: list[Any] = []

    def step() -> float:
        if not state:
            state.extend(init_train_state(params))
        *state[:], loss = train(*state, target, model_inputs)
        jax.block_until_ready(state)
        return float(loss)

    return ModelFunctions(
        lambda: jax.block_until_ready(forward(params, *model_inputs)),
        step,
        lambda: np.asarray(forward(params, *model_inputs)),
    )


def measure_compilation(shape: WanShape, depths: Sequence[int] = (6, 48)) -> dict[str, Any]:
    """Measure the seconds to trace and compile a training step, by depth, with a scan over layers.

    Accelerators always scan; `remat="full"` scans on every platform, so no accelerator is needed here.
    """
    seconds = {}
    for depth in depths:
        deep = replace(shape, layers=depth)
        config = replace(deep.make_config(), remat="full")
        predict = _make_prediction_fn(config, deep)

        def loss_fn(params: Any, target: jax.Array, model_inputs: Any, predict: Any = predict) -> jax.Array:
            return jnp.square(predict(params, *model_inputs) - target).mean()

        params = get_param_shapes(config.make)
        state = jax.eval_shape(init_train_state, params)
        inputs = _make_inputs(deep)
        jax.clear_caches()
        with _leave_compilation_cache():
            start_time = time.perf_counter()
            make_train_step(loss_fn).lower(*state, inputs.target, _make_model_inputs(deep, inputs)).compile()
            seconds[depth] = time.perf_counter() - start_time
        print(f"{depth} layers compile in {seconds[depth]:.1f} s", file=sys.stderr)
    return {
        "seconds": {f"{depth} layers": round(value, 2) for depth, value in seconds.items()},
        "ratio": round(seconds[depths[-1]] / seconds[depths[0]], 3),
    }


@contextlib.contextmanager
def _leave_compilation_cache() -> Iterator[None]:
    """Write no program to the cache on disk: that takes time, and the next measurement would only read it."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def _make_prediction_fn(config: WanDitConfig, shape: WanShape) -> Callable[..., jax.Array]:
    graph = get_graph_def(config.make)

    def predict(params, latents, text, time, segments, positions, text_segments):
        layout = PackedRows(segments=segments, positions=positions, count=1)
        conditioning = Conditioning(TextTokens(text, text_segments))
        noisy = patchify(latents[None], config.patch)
        prediction, _ = nnx.merge(graph, params)(noisy, time, layout, conditioning)
        return unpatchify(prediction, shape.grid, config.patch)[0]

    return predict


def _make_model_inputs(shape: WanShape, inputs: Inputs) -> tuple[np.ndarray, ...]:
    tokens = shape.grid.volume
    return (
        inputs.latents,
        inputs.text[None],
        np.full((1, 1), TIME, np.float32),
        np.ones((1, tokens), np.int32),
        compute_positions(shape.grid)[None],
        np.ones((1, shape.text_tokens), np.int32),
    )
