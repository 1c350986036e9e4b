"""Packed rows of Wan equal batches of one of `WanTransformer3DModel`, in values and gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.trees import flatten
from dit_video.families import load_denoiser, save_denoiser
from dit_video.families.wan.transformer import make_wan_tensor_map
from dit_video.models.conditioning import Conditioning, ConditioningLatents, ImageTokens, TextTokens
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid, PackedRows, compute_positions, patchify

pytestmark = pytest.mark.parity

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "ffn_dim": 40,
    "num_layers": 2,
    "freq_dim": 32,
}
T2V = SMALL
I2V = SMALL | {"in_channels": 9, "image_dim": 6, "added_kv_proj_dim": 32}
FIRST_AND_LAST = I2V | {"pos_embed_seq_len": 10}
GRIDS = (Grid(3, 2, 4), Grid(1, 3, 2))
"""Grids of tokens; latents are twice as high and wide."""
TEXTS = (7, 3)
PATCH = Grid(1, 2, 2)
FILE = "diffusion_pytorch_model.safetensors"
KINDS = {"t2v": T2V, "i2v": I2V, "first and last": FIRST_AND_LAST, "ti2v": SMALL}


class Clip:
    """One clip with all inputs of a model."""

    def __init__(self, number, arguments, *, per_token):
        draw = np.random.default_rng(number)
        grid, channels = GRIDS[number], arguments["in_channels"]
        self.grid = grid
        self.latents = draw.normal(size=(grid.t, 2 * grid.h, 2 * grid.w, channels)).astype(np.float32)
        self.weights = draw.normal(size=(grid.t, 2 * grid.h, 2 * grid.w, 4)).astype(np.float32)
        self.text = draw.normal(size=(TEXTS[number], arguments["text_dim"])).astype(np.float32)
        self.image = draw.normal(size=(10, arguments.get("image_dim") or 1)).astype(np.float32)
        self.time = np.float32((0.937, 0.25)[number])
        frames = np.full(grid, self.time, np.float32)
        if per_token:
            frames[0] = 0
        self.times = frames.reshape(-1)


def make_model(torch, arguments):
    """Return a model of diffusers whose parameters are all random."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def theirs_on(torch, model, clip, *, per_token):
    """Return the prediction `[t h w c]` of diffusers for one clip, and its weighted sum."""
    text = np.zeros((1, 512, clip.text.shape[1]), np.float32)
    text[0, : len(clip.text)] = clip.text
    time = 1000 * (clip.times[None] if per_token else clip.time[None])
    image = None
    if model.config.image_dim is not None:
        image = torch.from_numpy(clip.image)[None]
        if model.config.pos_embed_seq_len is not None:
            image = image.reshape(2, -1, image.shape[-1])
    prediction = model(
        torch.from_numpy(clip.latents).permute(3, 0, 1, 2)[None],
        torch.from_numpy(time),
        torch.from_numpy(text),
        image,
        return_dict=False,
    )[0][0].permute(1, 2, 3, 0)
    return prediction, (prediction * torch.from_numpy(clip.weights)).sum()


def packed(clips, config):
    """Pack the clips into one row, with padding that is not zero."""
    channels = config.channels
    parts = {
        "noisy": [patchify(clip.latents[..., :channels], PATCH) for clip in clips],
        "latents": [patchify(clip.latents[..., channels:], PATCH) for clip in clips],
        "weights": [patchify(clip.weights, PATCH) for clip in clips],
        "positions": [compute_positions(clip.grid) for clip in clips],
        "token_time": [clip.times for clip in clips],
        "context": [clip.text for clip in clips],
        "image": [clip.image for clip in clips],
    }
    row = {}
    for name, arrays in parts.items():
        padding = np.full((3, *arrays[0].shape[1:]), 0 if name == "weights" else 2, np.float32)
        row[name] = jnp.asarray(np.concatenate([*arrays, padding]))[None]
        ids = [np.full(len(array), index + 1, np.int32) for index, array in enumerate(arrays)]
        row[f"{name} segments"] = jnp.asarray(np.concatenate([*ids, np.zeros(3, np.int32)]))[None]
    return row


def ours_on(config, params, row, clips):
    """Return our prediction for a row, and the gradient of its weighted sum."""
    conditioning = Conditioning(TextTokens(row["context"], row["context segments"]))
    if config.cond_channels:
        conditioning = conditioning.add(ConditioningLatents(row["latents"]))
    if config.image_width is not None:
        conditioning = conditioning.add(ImageTokens(row["image"], row["image segments"]))
    segment_time = jnp.asarray([[clip.time for clip in clips] + [0.5]])
    time = row["token_time"] if config.time == "token" else segment_time
    layout = PackedRows(segments=row["noisy segments"], positions=row["positions"], count=segment_time.shape[1])
    graph = get_graph_def(config.make)

    def loss(params):
        prediction, _ = nnx.merge(graph, params)(row["noisy"], time, layout, conditioning)
        return (prediction * row["weights"]).sum(), prediction

    gradient, prediction = jax.jit(jax.grad(loss, has_aux=True))(params)
    return prediction[0], gradient


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_diffusers(tmp_path, torch, kind):
    arguments, per_token = KINDS[kind], kind == "ti2v"
    model = make_model(torch, arguments)
    (tmp_path / "model_index.json").write_text(json.dumps({"expand_timesteps": per_token}))
    model.save_pretrained(tmp_path / "transformer")
    config, params = load_denoiser(tmp_path / "transformer")
    assert config.time == ("token" if per_token else "segment")
    clips = [Clip(number, arguments, per_token=per_token) for number in range(2)]
    prediction, gradient = ours_on(config, params, packed(clips, config), clips)

    start = 0
    for clip in clips:
        expected, loss = theirs_on(torch, model, clip, per_token=per_token)
        loss.backward()
        expected = patchify(expected.detach().numpy(), PATCH)
        assert expected.std() > 0.1
        np.testing.assert_allclose(prediction[start : start + len(expected)], expected, atol=1e-4)
        start += len(expected)

    names = make_wan_tensor_map(config, "diffusers")
    expected_gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for path, leaf in flatten(gradient).items():
        foreign = names[path]
        for layer, name in enumerate(foreign.names):
            result = foreign.to_theirs(np.asarray(leaf if foreign.layers is None else leaf[layer]))
            expected = expected_gradients.pop(name).numpy()
            scale = np.abs(expected).max()
            assert scale > 1e-4, name
            # Scores of texts are nearly equal, so that the terms of these gradients nearly cancel behind the softmax;
            # what rounding leaves differs with the instructions of the CPU.
            tolerance = 2e-3 if ".attn2." in name or ".norm2." in name else 1e-3
            assert np.abs(result - expected).max() <= tolerance * scale, name
    assert not expected_gradients


def read_by_diffusers(model, folder):
    """Load a model as `from_pretrained` does, which for this class would need another package."""
    from safetensors.torch import load_file

    again = type(model).from_config(json.loads((folder / "config.json").read_text()))
    again.load_state_dict(load_file(folder / FILE))
    return again


@pytest.mark.parametrize("kind", ["t2v", "first and last"])
def test_folders_come_back_bit_for_bit(tmp_path, torch, kind):
    arguments = KINDS[kind]
    model = make_model(torch, arguments)
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    config, params = load_denoiser(tmp_path / "in")
    save_denoiser(tmp_path / "out", config, params)
    again = read_by_diffusers(model, tmp_path / "out")
    for (name, left), (_, right) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(left, right), name
    written, rewritten = (json.loads((tmp_path / way / "config.json").read_text()) for way in ("in", "out"))
    assert rewritten == {name: value for name, value in written.items() if name != "_diffusers_version"}


def test_half_precision_folders_come_back_bit_for_bit(tmp_path, torch):
    model = make_model(torch, T2V).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    config, params = load_denoiser(tmp_path / "in", dtype=None)
    save_denoiser(tmp_path / "out", config, params)
    again = read_by_diffusers(model, tmp_path / "out").to(torch.bfloat16)
    assert (tmp_path / "out" / FILE).stat().st_size == pytest.approx((tmp_path / "in" / FILE).stat().st_size, rel=0.05)
    for (name, left), (_, right) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(left, right), name


def test_the_authors_names_are_those_that_diffusers_converts(tmp_path, torch):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    from dit_video.weights.folders import TensorFolder

    model = make_model(torch, I2V)
    model.save_pretrained(tmp_path / "in")
    config, params = load_denoiser(tmp_path / "in")
    save_denoiser(tmp_path / "authors", config, params, layout="authors")
    with TensorFolder(tmp_path / "authors", stem="diffusion_pytorch_model") as tensors:
        written = {name: torch.from_numpy(tensors.read(name)) for name in tensors.shapes}
    assert "blocks.1.cross_attn.norm_k_img.weight" in written
    converted = convert_wan_transformer_to_diffusers(written)
    expected = model.state_dict()
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(converted[name], tensor), name
