"""A mixture of normal distributions in two dimensions, for which the optimal denoiser of any process is known.

For a component N(m, s^2), x_t = alpha x_0 + sigma e is normal around alpha m with variance v = (alpha s)^2 + sigma^2,
so that E[x_0 | x_t] = m + alpha s^2 (x_t - alpha m) / v and E[e | x_t] = sigma (x_t - alpha m) / v. For the mixture
both are the means over the components, weighted by their posterior probabilities given x_t.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.diffusion import stateless

MEANS = np.asarray([[1.5, 0.5], [-1.0, 1.0], [0.0, -1.2]])
STDS = np.asarray([0.25, 0.4, 0.3])
SHARES = np.asarray([0.5, 0.3, 0.2])
MEAN = SHARES @ MEANS
COVARIANCE = np.einsum("k,ki,kj->ij", SHARES, MEANS - MEAN, MEANS - MEAN) + (SHARES @ STDS**2) * np.eye(2)


def predict_data_and_noise(process, x, time):
    """Return the expected data and noise."""
    # As constants of a program they would keep their own dtype, whatever that of the program is.
    means, stds, shares = (jnp.asarray(part, x.dtype) for part in (MEANS, STDS, SHARES))
    alpha, sigma = process.alpha(time), process.sigma(time)
    variance = (alpha * stds) ** 2 + sigma**2
    away = x[..., None, :] - alpha * means
    likely = jnp.log(shares) - jnp.log(variance) - jnp.square(away).sum(axis=-1) / (2 * variance)
    weight = jax.nn.softmax(likely, axis=-1)[..., None]
    data = (weight * (means + alpha * stds[:, None] ** 2 / variance[:, None] * away)).sum(axis=-2)
    noise = (weight * sigma / variance[:, None] * away).sum(axis=-2)
    return data, noise


def make_denoise_fn(process, prediction):
    """Return the optimal `denoise`, whose input has the scale that the process gives its models."""

    def denoise(scaled, time):
        data, noise = predict_data_and_noise(process, scaled / process.input_scale(time), time)
        return prediction.target(process, data, noise, time)

    return stateless(denoise)


def sample(seed, count):
    """Draw samples of the mixture."""
    random = np.random.default_rng(seed)
    part = random.choice(len(SHARES), size=count, p=SHARES)
    return MEANS[part] + STDS[part, None] * random.normal(size=(count, 2))


def energy_distance(x, y):
    """Return the squared energy distance: 0 for two samples of one distribution, but for their finite size."""

    def distance(a, b):
        return np.linalg.norm(np.asarray(a)[:, None] - np.asarray(b)[None], axis=-1).mean()

    return 2 * distance(x, y) - distance(x, x) - distance(y, y)
