"""Preferences learned by another package: Diffusion-DPO (arXiv 2311.12908) on clips of the model itself."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Request
from dit_video.video import Clip


def train(
    pipe: Pipeline,
    prompts: Sequence[str],
    score: Callable[[Clip], float],
    *,
    rounds: int = 3,
    updates: int = 16,
    beta: float = 500.0,
    learning_rate: float = 3e-4,
    **options: Any,
) -> Pipeline:
    """Return the pipeline after rounds of sampling pairs of clips, and of training on which of them scores higher."""
    optimizer, reference = optax.adam(learning_rate), pipe.denoiser_params

    def compute_error(params, opened, time, number):
        """Return the error of each clip's velocity, with the same noise for both clips of a pair."""
        clips = opened.clips
        noise = clips.draw_noise("preferences", number)
        time = clips.process.shift_time(time)
        prediction, _ = opened.denoise(params, clips.process.add_noise(clips.data, noise, time), time)
        return opened.average(jnp.square(prediction - (noise - clips.data))).reshape(2, -1)

    @jax.jit
    def update(params, state, opened, number):
        time = jax.random.uniform(jax.random.fold_in(jax.random.key(0), number))

        def compute_loss(params):
            own, old = (compute_error(each, opened, time, number) for each in (params, reference))
            chosen, rejected = own - old
            return -jax.nn.log_sigmoid(beta * (rejected - chosen)).mean()

        loss, gradient = jax.value_and_grad(compute_loss)(params)
        change, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, change), state, loss

    params, state, numbers = reference, optimizer.init(reference), iter(range(rounds * updates))
    for number in range(rounds):
        model = pipe.replace(denoiser=params)
        seeds = np.arange(2 * len(prompts)).reshape(2, -1) + 2 * len(prompts) * number
        sampled = [model.generate(prompts, seed=each.tolist(), **options) for each in seeds]
        pairs = [sorted(pair, key=score, reverse=True) for pair in zip(*sampled, strict=True)]
        ordered = [clip for clips in zip(*pairs, strict=True) for clip in clips]  # the chosen ones first
        requests = [
            Request(clip.caption, np.shape(clip)[:3], seed=index % len(pairs)) for index, clip in enumerate(ordered)
        ]
        opened = pipe.open_denoiser(requests, [pipe.encode(clip) for clip in ordered])
        for _ in range(updates):
            params, state, _ = update(params, state, opened, next(numbers))
    return pipe.replace(denoiser=params)
