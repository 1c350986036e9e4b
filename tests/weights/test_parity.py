"""Our models equal diffusers', on small random weights that went through its folders."""

import json

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


SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "norm_num_groups": 4,
}
STABLE_DIFFUSION = SMALL | {"latent_channels": 4}
FLUX = SMALL | {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
ATTENTION = SMALL | {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    "mid_block_add_attention": False,
    "scaling_factor": 1.0,
    "latents_mean": (0.1, 0.2, 0.3, 0.4),
    "latents_std": (1.0, 2.0, 3.0, 4.0),
}


@pytest.mark.parametrize("arguments", [STABLE_DIFFUSION, FLUX, ATTENTION], ids=["sd", "flux", "attention"])
def test_image_autoencoder(tmp_path, arguments):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**arguments).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "in")
    config, params = load_autoencoder(tmp_path / "in")
    model = nnx.merge(graph_of(config.make), params)

    images = np.tanh(np.random.default_rng(0).normal(size=(2, 24, 32, 3))).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
        decoded = theirs.decode(posterior.mean).sample.permute(0, 2, 3, 1).numpy()
    mean, log_variance = (value.permute(0, 2, 3, 1).numpy() for value in (posterior.mean, posterior.logvar))
    assert mean.std() > 0.1
    assert decoded.std() > 0.1
    ours = jax.jit(lambda x: model.posterior(x))(images[None])
    np.testing.assert_allclose(ours.mean[0], mean, atol=1e-4)
    np.testing.assert_allclose(ours.log_variance[0], log_variance, atol=1e-4)
    np.testing.assert_allclose(jax.jit(lambda x: model.reconstruct(x))(mean[None])[0], decoded, atol=1e-4)

    save_autoencoder(tmp_path / "out", config, params)
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out")
    for (name, left), (_, right) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(left, right), name
    written, rewritten = (json.loads((tmp_path / way / "config.json").read_text()) for way in ("in", "out"))
    for name in arguments:
        assert rewritten.get(name) == written[name], name


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
