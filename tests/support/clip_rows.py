"""Rows of clips for functions of a denoiser, and the best denoiser of independent normal values."""

import jax
import numpy as np

from dit_video.diffusion import Estimate, stateless
from dit_video.sampling.clip_functions import PackedLatents
from dit_video.tokens import PackedExample, PackedShape, pack, stack_rows

MEAN = np.asarray([0.5, -0.3, 0.1, 0.0], np.float32)
STD = np.asarray([0.4, 1.0, 0.7, 0.1], np.float32)
"""Mean and standard deviation of each value of a token."""


def draw_clips(*tokens, seed=0):
    """Return the tokens of clips of these lengths."""
    generator = np.random.default_rng(seed)
    return [(MEAN + STD * generator.standard_normal((count, len(MEAN)))).astype(np.float32) for count in tokens]


def make_clip_rows(rows, process, prediction, *, seeds, room=4, is_clean=None):
    """Return rows of clips, each with a seed, and padding of `room` tokens."""
    shape = PackedShape(tokens=max(sum(map(len, row)) for row in rows) + room, text=1, segments=max(map(len, rows)) + 1)
    packed = []
    for row in rows:
        examples = [PackedExample(each, np.zeros((len(each), 3), np.float32), np.zeros(0, np.int32), 0) for each in row]
        packed.append(pack(examples, shape, width=len(MEAN)))
    batch = jax.device_put(stack_rows(packed))
    padded = np.zeros((len(rows), shape.segments), np.uint32)
    for number, row in enumerate(seeds):
        padded[number, : len(row)] = row
    keys = jax.vmap(jax.vmap(jax.random.key))(padded)
    return PackedLatents(batch, batch.tokens, keys, process, prediction, is_clean)


def make_best_denoise(process, prediction, *, mean=MEAN, std=STD):
    """Return the denoise with the best prediction of values with this mean and standard deviation."""

    def predict(noisy, time):
        noisy = noisy / process.input_scale(time)
        alpha, sigma = process.alpha(time), process.sigma(time)
        variance = (alpha * std) ** 2 + sigma**2
        noise = sigma / variance * (noisy - alpha * mean)
        data = mean + alpha * std**2 / variance * (noisy - alpha * mean)
        return prediction.target(process, *Estimate(data, noise)[:2], time)

    return stateless(predict)
