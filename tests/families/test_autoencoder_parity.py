"""Autoencoders equal those of diffusers, on small random weights from its folders."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.trees import flatten
from dit_video.families import load_autoencoder, save_autoencoder
from dit_video.families.kandinsky.autoencoder import make_vq_tensor_map
from dit_video.models.autoencoders import VqConfig
from dit_video.nn import get_graph_def, get_param_shapes

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
def test_image_autoencoders_equal_diffusers(tmp_path, arguments):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**arguments).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "in")
    config, params = load_autoencoder(tmp_path / "in")
    model = nnx.merge(get_graph_def(config.make), params)

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


VQ = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [16, 32],
    "norm_num_groups": 8,
    "latent_channels": 5,
    "vq_embed_dim": 3,
    "num_vq_embeddings": 50,
    "scaling_factor": 0.5,
}
MOVQ = {
    # Like Kandinsky's: attention at the lowest resolution, and norms that the codes modulate.
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 2,
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 50,
    "norm_type": "spatial",
}


@pytest.mark.parametrize("arguments", [VQ, MOVQ], ids=["group", "spatial"])
def test_vq_models_equal_diffusers(tmp_path, arguments):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.VQModel(**arguments).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        theirs.quantize.embedding.weight.normal_(std=0.5)
    theirs.save_pretrained(tmp_path / "in")
    config, params = load_autoencoder(tmp_path / "in")
    model = nnx.merge(get_graph_def(config.make), params)

    images = np.tanh(np.random.default_rng(0).normal(size=(2, 24, 32, 3))).astype(np.float32)
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latents
        codes, _, (_, _, indices) = theirs.quantize(latents)
        decoded, plain = (theirs.decode(latents, force_not_quantize=force).sample for force in (False, True))
    latents, codes, decoded, plain = (x.permute(0, 2, 3, 1).numpy()[None] for x in (latents, codes, decoded, plain))
    assert latents.std() > 0.1
    assert decoded.std() > 0.1
    assert np.abs(decoded - plain).max() > 0.1
    np.testing.assert_allclose(jax.jit(lambda x: model.compute_latents(x))(images[None]), latents, atol=1e-4)
    ours = jax.jit(lambda x: model.encode_indices(x))(images[None])
    np.testing.assert_array_equal(ours, indices.reshape(latents.shape[:-1]))
    assert len(np.unique(ours)) > 5
    np.testing.assert_allclose(model.codebook.look_up(ours), codes, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda x: model.decode_indices(x))(ours), decoded, atol=1e-4)
    # Kandinsky's pipelines decode latents that are not quantised (`force_not_quantize`).
    expected = plain if arguments is MOVQ else decoded
    np.testing.assert_allclose(
        jax.jit(lambda x: model.decode(x))(latents * config_scale(arguments)), expected, atol=1e-4
    )
    np.testing.assert_allclose(jax.jit(lambda x: model.reconstruct(x))(latents), plain, atol=1e-4)

    save_autoencoder(tmp_path / "out", config, params)
    again = diffusers.VQModel.from_pretrained(tmp_path / "out")
    for (name, left), (_, right) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(left, right), name
    for name in arguments:
        assert again.config[name] == theirs.config[name], name


def test_kandinskys_movq_has_the_tensors_of_diffusers():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.VQModel(
            down_block_types=["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
            up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3,
            block_out_channels=[128, 256, 256, 512],
            layers_per_block=2,
            latent_channels=4,
            num_vq_embeddings=16384,
            norm_type="spatial",
        )
    config = VqConfig.kandinsky()
    shapes = flatten(get_param_shapes(config.make))
    names = make_vq_tensor_map(config)
    ours = {
        names[path].name: names[path].to_theirs(np.broadcast_to(np.int8(0), leaf.shape)).shape
        for path, leaf in shapes.items()
        if not path.startswith("normalizer")
    }
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}


def config_scale(arguments):
    """Return the factor by which diffusion multiplies latents."""
    return np.float32(arguments.get("scaling_factor", 0.18215))


@pytest.mark.parametrize("arguments", [WAN21, WAN22], ids=["2.1", "2.2"])
def test_wan_autoencoders_equal_diffusers(tmp_path, arguments):
    """The 17 frames are five chunks for the encoder and the decoder of diffusers."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(**arguments).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "in")
    config, params = load_autoencoder(tmp_path / "in")
    model = nnx.merge(get_graph_def(config.make), params)

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
