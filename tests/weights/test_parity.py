"""Our models equal diffusers', on small random weights that went through its folders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.nn import graph_of
from dit_video.weights import load_autoencoder, save_autoencoder

pytestmark = pytest.mark.parity

WAN21 = {"base_dim": 8, "z_dim": 4, "latents_mean": [0.1] * 4, "latents_std": [1.5, 1.0, 2.0, 1.0]}
WAN22 = {
    "base_dim": 8,
    "decoder_base_dim": 12,
    "z_dim": 6,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [0.2] * 6,
    "latents_std": [1.5] * 6,
}


@pytest.mark.parametrize("arguments", [WAN21, WAN22], ids=["2.1", "2.2"])
def test_wan_autoencoder(tmp_path, arguments):
    """17 frames are five chunks of diffusers' encoder and of its decoder."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(**arguments).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "in")
    config, params = load_autoencoder(tmp_path / "in")
    model = nnx.merge(graph_of(config.make), params)

    clip = np.tanh(np.random.default_rng(0).normal(size=(1, 17, 32, 48, 3))).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(clip).permute(0, 4, 1, 2, 3)).latent_dist
        decoded = theirs.decode(posterior.mean).sample.permute(0, 2, 3, 4, 1).numpy()
    mean, log_variance = (value.permute(0, 2, 3, 4, 1).numpy() for value in (posterior.mean, posterior.logvar))
    assert mean.std() > 0.1
    assert decoded.std() > 0.1
    ours = jax.jit(lambda x: model.posterior(x))(clip)
    np.testing.assert_allclose(ours.mean, mean, atol=1e-4)
    np.testing.assert_allclose(ours.log_variance, log_variance, atol=1e-4)
    pixels = jax.jit(lambda x: model.reconstruct(x))(mean)
    np.testing.assert_allclose(jnp.clip(pixels, -1, 1), decoded, atol=1e-4)
    std = np.asarray(theirs.config.latents_std, np.float32)
    normal = (mean - np.asarray(theirs.config.latents_mean, np.float32)) / std
    np.testing.assert_allclose(jax.jit(lambda x: model.encode(x))(clip), normal, atol=1e-4)

    save_autoencoder(tmp_path / "out", config, params)
    again = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "out")
    for (name, left), (_, right) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(left, right), name
    for name in arguments:
        assert again.config[name] == theirs.config[name], name
