"""Speed of autoencoders against diffusers' `AutoencoderKLWan` on the same weights and inputs, and torch's attention.

Both autoencoders run in one process, interleaved. torch uses as many threads as there are cores. The ratio is that of
the medians.
"""

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from diffusers import AutoencoderKLWan
from flax import nnx

from benchmarks.timer import time_median
from dit_video.families import load_autoencoder
from dit_video.nn import get_graph_def

CLIP_SHAPE, TRAINING_SHAPE = (1, 17, 128, 128, 3), (2, 9, 64, 64, 3)
WIDTHS = (32, 96)
"""Channels of the first level, of a laptop's model and of Wan 2.1."""
_LEARNING_RATE = 1e-4


def measure_against_diffusers(rounds: int) -> dict[str, Any]:
    """Measure encoding, decoding and a training step, by the width of the model."""
    torch.set_num_threads(count_cores())
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clip": "x".join(map(str, CLIP_SHAPE)),
        "trained_on": "x".join(map(str, TRAINING_SHAPE)),
    } | {f"width {width}": _measure_width(width, rounds) for width in WIDTHS}


def make_torch_attention(qkv: Sequence[np.ndarray], backward: bool) -> Callable[[], Any]:
    """Return a function that calls torch's attention without a mask, with as many threads as there are cores."""
    torch.set_num_threads(count_cores())
    tensors = [torch.from_numpy(np.ascontiguousarray(x)).requires_grad_(backward) for x in qkv]

    def call() -> Any:
        with torch.set_grad_enabled(backward):
            out = torch.nn.functional.scaled_dot_product_attention(*tensors)
        return torch.autograd.grad(out.sum(), tensors) if backward else out

    return call


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _measure_width(width: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    theirs = AutoencoderKLWan(base_dim=width).eval()
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder:
        theirs.save_pretrained(folder)
        config, params = load_autoencoder(Path(folder))
    graph, params = get_graph_def(config.make), jax.device_put(params)
    encode = jax.jit(lambda params, clip: nnx.merge(graph, params).posterior(clip).mean)
    decode = jax.jit(lambda params, latents: nnx.merge(graph, params).reconstruct(latents))
    clip = np.random.default_rng(0).uniform(-1, 1, CLIP_SHAPE).astype(np.float32)
    theirs_clip = torch.from_numpy(clip).permute(0, 4, 1, 2, 3).contiguous()
    with torch.no_grad():
        theirs_latents = theirs.encode(theirs_clip).latent_dist.mean
        decoded = theirs.decode(theirs_latents).sample.permute(0, 2, 3, 4, 1).numpy()
        latents = np.ascontiguousarray(theirs_latents.permute(0, 2, 3, 4, 1).numpy())
        figures: dict[str, Any] = {
            "difference": {
                "latents": float(np.abs(encode(params, clip) - latents).max()),
                "pixels": float(np.abs(np.clip(decode(params, latents), -1, 1) - decoded).max()),
            },
            "encode": _compare(
                f"width {width}, encode",
                lambda: jax.block_until_ready(encode(params, clip)),
                lambda: theirs.encode(theirs_clip),
                rounds,
            ),
            "decode": _compare(
                f"width {width}, decode",
                lambda: jax.block_until_ready(decode(params, latents)),
                lambda: theirs.decode(theirs_latents),
                rounds,
            ),
        }
    steps = _make_our_step(graph, params), _make_their_step(theirs)
    return figures | {"training step": _compare(f"width {width}, training step", *steps, rounds)}


def _make_our_step(graph: nnx.GraphDef, params: Any) -> Callable[[], None]:
    """Return a step of forward, backward and AdamW on the mean squared error; parameters and state are donated."""
    trainable = {name: part for name, part in params.items() if name != "normalizer"}
    optimizer = optax.adamw(_LEARNING_RATE)
    clip = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, TRAINING_SHAPE), jnp.float32)

    def loss_fn(trainable: Any) -> jax.Array:
        model = nnx.merge(graph, trainable | {"normalizer": params["normalizer"]})
        return jnp.square(model.reconstruct(model.posterior(clip).mean) - clip).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss_fn)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    buffers = [jax.tree.map(jnp.copy, trainable), jax.jit(optimizer.init)(trainable)]

    def call() -> None:
        buffers[:] = step(*buffers)
        jax.block_until_ready(buffers)

    return call


def _make_their_step(model: AutoencoderKLWan) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    pixels = np.random.default_rng(1).uniform(-1, 1, TRAINING_SHAPE).astype(np.float32)
    clip = torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).contiguous()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        decoded = model.decode(model.encode(clip).latent_dist.mean).sample
        (decoded - clip).square().mean().backward()
        optimizer.step()

    return step


def _compare(title: str, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Measure the seconds of both, and print them to stderr."""
    seconds = time_median({"ours": ours, "diffusers": theirs}, rounds)
    print(f"{title}: {seconds['ours']:.3f} s, diffusers {seconds['diffusers']:.3f} s", file=sys.stderr, flush=True)
    return {
        "ours_seconds": round(seconds["ours"], 3),
        "diffusers_seconds": round(seconds["diffusers"], 3),
        "ratio": round(seconds["ours"] / seconds["diffusers"], 3),
        "rounds": rounds,
    }
