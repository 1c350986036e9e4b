"""LTX-Video's autoencoders equal diffusers', on small random weights from its folders, in values and gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.trees import flatten
from dit_video.families import load_autoencoder, save_autoencoder
from dit_video.families.ltx.autoencoder import make_document, make_tensor_map
from dit_video.models.autoencoders import LtxVaeConfig
from dit_video.nn import get_graph_def, get_param_shapes

pytestmark = pytest.mark.parity

LTX_090 = {
    "latent_channels": 6,
    "block_out_channels": (8, 12, 16, 16),
    "decoder_block_out_channels": (8, 12, 16, 16),
    "layers_per_block": (1, 0, 0, 0, 1),
    "decoder_layers_per_block": (1, 0, 0, 0, 1),
}
_UPSAMPLING = {
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (0, 1, 0, 1),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
LTX_091 = LTX_090 | _UPSAMPLING | {"decoder_inject_noise": (True, True, True, False)}
LTX_095 = _UPSAMPLING | {
    "latent_channels": 6,
    "block_out_channels": (8, 8, 16, 32, 32),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "layers_per_block": (1, 0, 0, 0, 1),
    "spatio_temporal_scaling": (True, True, True, True),
    "decoder_inject_noise": (False,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
VERSIONS = {"0.9.0": LTX_090, "0.9.1": LTX_091, "0.9.5": LTX_095}
COMPUTED = {
    "0.9.0": LTX_090,
    "0.9.5 with the noise of 0.9.1": LTX_095 | {"decoder_inject_noise": (True, True, True, False)},
}
"""Models that together have all kinds of blocks."""
PUBLISHED = {
    "0.9.0": LtxVaeConfig.ltx_090(),
    "0.9.1": LtxVaeConfig.ltx_091(),
    "0.9.5": LtxVaeConfig.ltx_095(),
}
TIME, SIZE = 0.05, (1, 17, 32, 64, 3)


def make_theirs(torch, arguments):
    """Return a model of diffusers whose parameters and statistics are random."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLLTXVideo(**arguments).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.3 if "per_channel_scale" in name else 0.05) * torch.randn_like(parameter))
        model.latents_mean.normal_(std=0.5)
        model.latents_std.uniform_(0.5, 2.0)
    return model


def to_channels_last(tensor):
    return tensor.detach().permute(0, 2, 3, 4, 1).numpy()


def replace_noise(monkeypatch, torch, keys):
    """Let diffusers' layers draw the noise of ours: that of the only clip's key, by the number of the draw."""
    drawn = []

    def draw(shape, **_):
        drawn.append(None)
        key = jax.random.fold_in(keys[0], len(drawn) - 1)
        return torch.from_numpy(np.array(jax.random.normal(key, (1, *shape, 1)))[0, ..., 0])

    monkeypatch.setattr("diffusers.models.autoencoders.autoencoder_kl_ltx.torch.randn", draw)
    return drawn


@pytest.mark.parametrize("version", COMPUTED)
def test_values_and_gradients_equal_diffusers(tmp_path, monkeypatch, version):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    theirs, keys = make_theirs(torch, COMPUTED[version]), jax.random.split(jax.random.key(3), 1)
    theirs.save_pretrained(tmp_path)
    config, params = load_autoencoder(tmp_path)
    graph, draw = get_graph_def(config.make), np.random.default_rng(0)
    clip = np.tanh(draw.normal(size=SIZE)).astype(np.float32)
    latents = draw.normal(size=(1, 3, 1, 2, config.channels)).astype(np.float32)
    weights = draw.normal(size=SIZE).astype(np.float32)

    posterior = theirs.encode(torch.from_numpy(clip).permute(0, 4, 1, 2, 3)).latent_dist
    drawn = replace_noise(monkeypatch, torch, keys)
    time = torch.tensor([TIME]) if config.has_time else None
    decoded = theirs.decode(torch.from_numpy(latents).permute(0, 4, 1, 2, 3), time).sample
    assert bool(drawn) == any(config.noise)
    mean, expected = to_channels_last(posterior.mean), to_channels_last(decoded)
    assert mean.std() > 0.1
    assert expected.std() > 0.1

    def loss(params):
        model = nnx.merge(graph, params)
        pixels = model.reconstruct(jnp.asarray(latents), time=TIME, keys=keys)
        own = model.posterior(jnp.asarray(clip))
        return (pixels * weights).sum() + own.mean.sum(), (pixels, own, model.normalizer.normalize(own.mean))

    gradient, (pixels, own, normalized) = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(own.mean, mean, atol=1e-4)
    np.testing.assert_allclose(own.log_variance, to_channels_last(posterior.logvar), atol=1e-4)
    np.testing.assert_allclose(pixels, expected, atol=1e-4)
    normal = (mean - theirs.latents_mean.numpy()) / theirs.latents_std.numpy()
    np.testing.assert_allclose(normalized, normal, atol=1e-4)

    weighted = (decoded * torch.from_numpy(weights).permute(0, 4, 1, 2, 3)).sum() + posterior.mean.sum()
    weighted.backward()
    unused = {name for name, each in theirs.named_parameters() if each.grad is None}
    assert all("time_embedder" in name for name in unused), "of levels without blocks"
    gradients = {name: each.grad.numpy() for name, each in theirs.named_parameters() if name not in unused}
    names = make_tensor_map(config)
    for path, leaf in flatten(gradient).items():
        if path.startswith("normalizer") or names[path].name in unused:
            continue
        result, expected = names[path].to_theirs(np.asarray(leaf)), gradients.pop(names[path].name)
        assert np.abs(result - expected).max() <= 1e-3 * np.abs(expected).max() + 1e-6, path
    assert not gradients


@pytest.mark.parametrize("version", VERSIONS)
def test_folders_come_back_bit_for_bit(tmp_path, version):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    theirs = make_theirs(torch, VERSIONS[version])
    theirs.save_pretrained(tmp_path / "in")
    config, params = load_autoencoder(tmp_path / "in")
    save_autoencoder(tmp_path / "out", config, params)
    again = diffusers.AutoencoderKLLTXVideo.from_pretrained(tmp_path / "out")
    for (name, left), (_, right) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(left, right), name
    written, rewritten = (json.loads((tmp_path / way / "config.json").read_text()) for way in ("in", "out"))
    assert rewritten == {name: value for name, value in written.items() if name != "_diffusers_version"}


@pytest.mark.parametrize("version", PUBLISHED)
def test_names_and_shapes_of_published_versions_are_diffusers(version):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    config = PUBLISHED[version]
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLLTXVideo(**make_document(config, {}))
    names = make_tensor_map(config)
    ours = {
        names[path].name: names[path].to_theirs(np.broadcast_to(np.int8(0), leaf.shape)).shape
        for path, leaf in flatten(get_param_shapes(config.make)).items()
    }
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert config.stride == (8, 32, 32)
    assert config.stride[1:] == (theirs.spatial_compression_ratio,) * 2
