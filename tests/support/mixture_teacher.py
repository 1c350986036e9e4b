"""A teacher whose denoiser is exact, for a mixture of Gaussians in the plane, and a student that begins equal to it.

Nothing has to be trained before it is distilled.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.diffusion import RectifiedFlow, Velocity
from support.gaussian_mixture import energy_distance

__all__ = ["PREDICTION", "PROCESS", "denoise", "energy_distance", "init_student", "make_student", "sample"]

PROCESS, PREDICTION = RectifiedFlow(), Velocity()
MEANS = np.asarray([[1.2, 0.0], [-0.6, 1.0], [-0.6, -1.0]])
STD = 0.3
WIDTH = 48


def sample(key, count):
    """Draw samples of the mixture."""
    which, noise = jax.random.randint(key, (count,), 0, len(MEANS)), jax.random.normal(key, (count, 2))
    return jnp.asarray(MEANS)[which] + STD * noise


def denoise(noisy, time):
    """Return the exact velocity of the mixture's flow."""
    alpha, sigma = PROCESS.alpha(time), PROCESS.sigma(time)
    variance = (alpha * STD) ** 2 + sigma**2
    away = noisy[..., None, :] - alpha[..., None] * jnp.asarray(MEANS)
    share = jax.nn.softmax(-0.5 * jnp.square(away).sum(axis=-1) / variance, axis=-1)
    mean = share @ jnp.asarray(MEANS)
    data = mean + (alpha * STD**2 / variance) * (noisy - alpha * mean)
    noise = (noisy - alpha * data) / jnp.maximum(sigma, 1e-6)
    return noise - data


def init_student(key):
    """Return the parameters of a student that predicts the same as the teacher."""
    first, second = jax.random.split(key)
    return {
        "in": jax.random.normal(first, (3, WIDTH)),
        "shift": jax.random.normal(second, (WIDTH,)),
        "middle": jax.random.normal(second, (WIDTH, WIDTH)) / WIDTH**0.5,
        "out": jnp.zeros((WIDTH, 2)),
    }


def make_student(params):
    """Return the `denoise` of the student: the teacher's velocity plus the output of a small network."""

    def student(noisy, time):
        time = jnp.broadcast_to(time, (*noisy.shape[:-1], 1))
        hidden = jnp.tanh(jnp.concatenate([noisy, 4 * time], axis=-1) @ params["in"] + params["shift"])
        return denoise(noisy, time) + jnp.tanh(hidden @ params["middle"]) @ params["out"]

    return student
