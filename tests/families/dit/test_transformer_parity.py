"""DiT and SiT equal the models of diffusers and of the authors in values, gradients and guided sampling."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dit_video.core.trees import flatten
from dit_video.diffusion import Euler, RectifiedFlow, UniformTimes, apply_classifier_free_guidance, sample
from dit_video.families import load_denoiser, save_denoiser
from dit_video.families.dit.transformer import DitDenoiserFormat
from dit_video.models.backbones.denoise import make_denoise_fn
from dit_video.models.conditioning import ClassIds, Conditioning
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.tokens import Grid, PackedRows, compute_positions, patchify, unpatchify

pytestmark = pytest.mark.parity

CHANNELS, CLASSES, SIDE, PATCH, WIDTH, HEADS, DEPTH = 3, 5, 8, Grid(1, 2, 2), 32, 2, 2
GRID = Grid(1, 4, 4)
"""Grid of tokens."""
AUTHORS = {
    "input_size": SIDE,
    "in_channels": CHANNELS,
    "hidden_size": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "num_classes": CLASSES,
}
FILE = "diffusion_pytorch_model.safetensors"
LABELS = (3, CLASSES)


def authors_shapes():
    """Return the shapes of the authors' state dict."""
    both, hidden, inputs = 2 * CHANNELS * 4, 4 * WIDTH, (WIDTH, CHANNELS, 2, 2)
    shapes = {
        "x_embedder.proj.weight": inputs,
        "x_embedder.proj.bias": (WIDTH,),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.0.bias": (WIDTH,),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "t_embedder.mlp.2.bias": (WIDTH,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        "final_layer.linear.weight": (both, WIDTH),
        "final_layer.linear.bias": (both,),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
    }
    for layer in range(DEPTH):
        for name, out, into in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", hidden, WIDTH),
            ("mlp.fc2", WIDTH, hidden),
            ("adaLN_modulation.1", 6 * WIDTH, WIDTH),
        ):
            shapes |= {f"blocks.{layer}.{name}.weight": (out, into), f"blocks.{layer}.{name}.bias": (out,)}
    return shapes


def draw_params(torch):
    draw = np.random.default_rng(0)

    def tensor(shape):
        values = draw.normal(size=shape) / np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else 4)
        return torch.tensor(values, dtype=torch.float32, requires_grad=True)

    return {name: tensor(shape) for name, shape in authors_shapes().items()}


def table(torch):
    """Return the position table: half of the width for the column, half for the row, each sines then cosines."""
    side, quarter = SIDE // 2, WIDTH // 4
    rates = [10_000 ** (-index / quarter) for index in range(quarter)]
    waves = [[wave(index * rate) for wave in (math.sin, math.cos) for rate in rates] for index in range(side)]
    return torch.tensor([waves[column] + waves[row] for row in range(side) for column in range(side)])


def dense(values, x, name):
    return x @ values[f"{name}.weight"].T + values[f"{name}.bias"]


def norm(torch, x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def authors_block(torch, values, name, x, condition):
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = dense(values, condition, f"{name}.adaLN_modulation.1")[
        :, None
    ].chunk(6, dim=-1)
    qkv = dense(values, norm(torch, x) * (1 + scale) + shift, f"{name}.attn.qkv")
    q, k, v = qkv.unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
    mixed = ((q @ k.mT) / (WIDTH // HEADS) ** 0.5).softmax(dim=-1) @ v
    x = x + gate * dense(values, mixed.transpose(1, 2).flatten(2), f"{name}.attn.proj")
    hidden = dense(values, norm(torch, x) * (1 + mlp_scale) + mlp_shift, f"{name}.mlp.fc1")
    hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
    return x + mlp_gate * dense(values, hidden, f"{name}.mlp.fc2")


def authors_model(torch, values, images, times, labels):
    """Compute all output channels for images `[b c h w]`, at times on the scale of the model."""
    functional = torch.nn.functional
    patches = functional.conv2d(images, values["x_embedder.proj.weight"], values["x_embedder.proj.bias"], stride=2)
    x = patches.flatten(2).mT + table(torch)
    angles = times[:, None] * 10_000 ** (-torch.arange(128) / 128)
    time = functional.silu(dense(values, torch.cat([angles.cos(), angles.sin()], dim=1), "t_embedder.mlp.0"))
    condition = dense(values, time, "t_embedder.mlp.2") + values["y_embedder.embedding_table.weight"][labels]
    condition = functional.silu(condition)
    for layer in range(DEPTH):
        x = authors_block(torch, values, f"blocks.{layer}", x, condition)
    shift, scale = dense(values, condition, "final_layer.adaLN_modulation.1")[:, None].chunk(2, dim=-1)
    x = dense(values, norm(torch, x) * (1 + scale) + shift, "final_layer.linear")
    x = x.unflatten(1, GRID[1:]).unflatten(3, (2, 2, 2 * CHANNELS))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def authors_folder(folder, torch, values, kind):
    folder.mkdir()
    tensors = {name: value.detach().numpy() for name, value in values.items()}
    tensors["pos_embed"] = table(torch)[None].float().numpy()
    safetensors.numpy.save_file(tensors, folder / FILE)
    (folder / "config.json").write_text(json.dumps({"_class_name": kind, **AUTHORS}))


def draw_inputs(channels):
    """Return images `[b c h w]`, times from data at 0 to noise at 1, and weights of all output channels."""
    draw = np.random.default_rng(1)
    images = draw.normal(size=(2, CHANNELS, SIDE, SIDE)).astype(np.float32)
    return images, np.float32([0.937, 0.25]), draw.normal(size=(2, channels, SIDE, SIDE)).astype(np.float32)


def tokens(images):
    """Patchify images `[b c h w]` into the tokens `[1 n p]` of one row."""
    return jnp.concatenate([patchify(image.transpose(1, 2, 0)[None], PATCH) for image in images])[None]


POSITIONS = jnp.asarray(compute_positions(GRID))
LAYOUT = PackedRows(
    segments=jnp.repeat(jnp.asarray([[1, 2]]), GRID.volume, axis=1),
    positions=jnp.tile(POSITIONS, (2, 1))[None],
    count=2,
)


def assert_same_function(config, params, theirs, expected_gradients, names):
    """Assert equal predictions for a row of two images, and equal gradients of their weighted sum."""
    channels = theirs.shape[1]
    images, times, weights = draw_inputs(channels)
    graph = get_graph_def(config.make)

    def loss(params):
        labels = Conditioning(ClassIds(jnp.asarray([LABELS])))
        prediction, _ = nnx.merge(graph, params)(tokens(images), jnp.asarray(times)[None], LAYOUT, labels)
        return (prediction * tokens(weights)).sum(), prediction

    gradient, prediction = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(prediction, tokens(theirs), atol=1e-4)
    left = dict(expected_gradients)
    for path, leaf in flatten(gradient).items():
        parts = names.parts[path]
        for part, own in zip(parts, np.split(np.asarray(leaf), len(parts), axis=-1), strict=True):
            for layer, name in enumerate(part.names):
                expected = left.pop(name)
                for copy in names.copies.get(path, ()):
                    expected = expected + left.pop(copy.name)
                result = part.to_theirs(own if part.layers is None else own[layer])
                scale = np.abs(expected).max()
                if name.endswith("to_k.bias"):  # softmax ignores it
                    assert max(scale, np.abs(result).max()) < 1e-4
                    continue
                assert scale > 1e-4, f"{name} has no gradient: the comparison would say nothing"
                assert np.abs(result - expected).max() <= 1e-3 * scale, name
    assert not left


@pytest.mark.parametrize("kind", ["DiT", "SiT"])
def test_values_and_gradients_equal_the_authors_model(tmp_path, torch, kind):
    values = draw_params(torch)
    channels = CHANNELS * (2 if kind == "DiT" else 1)
    images, times, weights = draw_inputs(channels)
    # The time of SiT runs from noise to data, so its velocity points to the data.
    model_times = 1000 * times if kind == "DiT" else 1 - times
    output = authors_model(torch, values, torch.tensor(images), torch.tensor(model_times), torch.tensor(LABELS))
    theirs = output if kind == "DiT" else -output[:, :CHANNELS]
    (theirs * torch.tensor(weights)).sum().backward()

    authors_folder(tmp_path / "model", torch, values, kind)
    config, params = load_denoiser(tmp_path / "model")
    gradients = {name: value.grad.numpy() for name, value in values.items()}
    assert_same_function(
        config, params, theirs.detach().numpy(), gradients, DitDenoiserFormat().make_file_map(config, "authors")
    )

    save_denoiser(tmp_path / "again", config, params, layout="authors")
    before, after = (safetensors.numpy.load_file(tmp_path / name / FILE) for name in ("model", "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)


def test_values_and_gradients_equal_diffusers(tmp_path, torch):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=DEPTH,
        sample_size=SIDE,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-2,  # far from that of the other norms
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:  # as all published models have it
        block.norm1.emb.load_state_dict(first)
    images, times, weights = draw_inputs(2 * CHANNELS)
    theirs = model(torch.tensor(images), torch.tensor(1000 * times), torch.tensor(LABELS), return_dict=False)[0]
    (theirs * torch.tensor(weights)).sum().backward()

    model.save_pretrained(tmp_path / "model")
    config, params = load_denoiser(tmp_path / "model")
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert_same_function(
        config, params, theirs.detach().numpy(), gradients, DitDenoiserFormat().make_file_map(config, "diffusers")
    )

    save_denoiser(tmp_path / "again", config, params)
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "again")
    settings = [{name: value for name, value in one.config.items() if name[0] != "_"} for one in (again, model)]
    assert settings[0] == settings[1]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_guided_sampling_equals_the_authors(tmp_path, torch):
    """SiT takes four Euler steps from noise at 0 to data at 1, with guidance of all channels."""
    values, scale, steps = draw_params(torch), 2.5, 4
    noise = draw_inputs(CHANNELS)[0][:1]
    x = torch.tensor(noise)
    with torch.no_grad():
        for start, following in itertools.pairwise(torch.linspace(0, 1, steps + 1)):
            both = authors_model(torch, values, torch.cat([x, x]), start.expand(2), torch.tensor(LABELS))[:, :CHANNELS]
            conditional, unconditional = both.chunk(2)
            x = x + (following - start) * (unconditional + scale * (conditional - unconditional))

    authors_folder(tmp_path / "model", torch, values, "SiT")
    config, params = load_denoiser(tmp_path / "model")
    assert flatten(params).keys() == flatten(get_param_shapes(config.make)).keys()
    layout = PackedRows(segments=jnp.ones((1, GRID.volume), jnp.int32), positions=POSITIONS[None], count=1)

    @jax.jit
    def sampled(params):
        def branch(label):
            conditioning = Conditioning(ClassIds(jnp.asarray([[label]])))
            denoise = make_denoise_fn(nnx.merge(get_graph_def(config.make), params), layout, conditioning)
            return lambda noisy, time, state: denoise(noisy, jnp.full(noisy.shape[:2], time), state)

        process = RectifiedFlow()
        guided = apply_classifier_free_guidance(branch(LABELS[0]), branch(LABELS[1]), scale)
        return sample(guided, tokens(noise), UniformTimes()(process, steps).times, process=process, solver=Euler())

    result = unpatchify(np.asarray(sampled(params)[0]), GRID, PATCH)[0].transpose(2, 0, 1)
    assert np.abs(x.numpy() - noise).max() > 0.5
    np.testing.assert_allclose(result, x[0].numpy(), atol=1e-4)
