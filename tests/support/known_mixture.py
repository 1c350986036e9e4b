"""A mixture of Gaussians in the plane whose flow is known, and a student that begins as it.

Its denoiser is exact, so that nothing has to be trained before it is distilled.
"""

import jax
import jax.numpy as jnp
import numpy as np
from diffusion.mixture import energy_distance

from dit_video.diffusion import RectifiedFlow, Velocity

__all__ = ["PREDICTION", "PROCESS", "data", "denoise", "energy_distance", "student", "student_params"]

PROCESS, PREDICTION = RectifiedFlow(), Velocity()
MEANS = np.asarray([[1.2, 0.0], [-0.6, 1.0], [-0.6, -1.0]])
STD = 0.3
WIDTH = 48


def data(key, count):
    """Samples of the mixture."""
    which, noise = jax.random.randint(key, (count,), 0, len(MEANS)), jax.random.normal(key, (count, 2))
    return jnp.asarray(MEANS)[which] + STD * noise


def denoise(noisy, time):
    """The velocity of the mixture's flow: exact."""
    alpha, sigma = PROCESS.alpha(time), PROCESS.sigma(time)
    variance = (alpha * STD) ** 2 + sigma**2
    away = noisy[..., None, :] - alpha[..., None] * jnp.asarray(MEANS)
    share = jax.nn.softmax(-0.5 * jnp.square(away).sum(axis=-1) / variance, axis=-1)
    mean = share @ jnp.asarray(MEANS)
    found = mean + (alpha * STD**2 / variance) * (noisy - alpha * mean)
    noise = (noisy - alpha * found) / jnp.maximum(sigma, 1e-6)
    return noise - found


def student_params(key):
    """Of a student that is the teacher as yet."""
    first, second = jax.random.split(key)
    return {
        "in": jax.random.normal(first, (3, WIDTH)),
        "shift": jax.random.normal(second, (WIDTH,)),
        "middle": jax.random.normal(second, (WIDTH, WIDTH)) / WIDTH**0.5,
        "out": jnp.zeros((WIDTH, 2)),
    }


def student(params):
    """`denoise` of the student: the teacher's, and what a small network adds to it."""

    def changed(noisy, time):
        time = jnp.broadcast_to(time, (*noisy.shape[:-1], 1))
        hidden = jnp.tanh(jnp.concatenate([noisy, 4 * time], axis=-1) @ params["in"] + params["shift"])
        return denoise(noisy, time) + jnp.tanh(hidden @ params["middle"]) @ params["out"]

    return changed
