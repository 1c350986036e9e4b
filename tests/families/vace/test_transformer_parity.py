"""Packed rows of VACE equal batches of one of `WanVACETransformer3DModel`, in values and gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.rng import key
from dit_video.core.trees import flatten, map_with_path
from dit_video.families import get_lora_modules, load_denoiser, save_denoiser
from dit_video.families.denoisers import find_format
from dit_video.models.backbones.vace import ControlLatents
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import LoraConfig, add_lora_scale, get_graph_def, init_lora, merge_lora
from dit_video.tokens import Grid, PackedRows, compute_positions, patchify
from dit_video.weights import save_lora

pytestmark = pytest.mark.parity

ARGUMENTS = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "ffn_dim": 40,
    "num_layers": 4,
    "freq_dim": 32,
    "vace_layers": [0, 2],
    "vace_in_channels": 14,
}
GRIDS, TEXTS, TIMES = (Grid(3, 2, 4), Grid(1, 3, 2)), (7, 3), (0.937, 0.25)
"""Grid of tokens of each clip (latents are twice as high and wide), length of its text, and its time."""
STRENGTHS = ((0.8, 1.5), (1.0, -0.4))
"""Scales of the two hints of each clip."""
PATCH = Grid(1, 2, 2)
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(torch):
    """Return a model of diffusers whose parameters are all random."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.WanVACETransformer3DModel(**ARGUMENTS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vace") / "transformer"
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def draw_clip(number):
    """Return the latents, control and weights `[t h w c]` of a clip, and its text `[S E]`."""
    draw, grid = np.random.default_rng(number), GRIDS[number]
    shape = (grid.t, 2 * grid.h, 2 * grid.w)
    shapes = ((*shape, 4), (*shape, 14), (*shape, 4), (TEXTS[number], 10))
    return [draw.normal(size=each).astype(np.float32) for each in shapes]


def predict_theirs(torch, model, number):
    """Return the prediction `[t h w c]` of diffusers for a clip, and its weighted sum."""
    latents, control, weights, text = draw_clip(number)
    padded = np.zeros((1, 512, 10), np.float32)
    padded[0, : len(text)] = text
    noisy, control = (torch.from_numpy(each).permute(3, 0, 1, 2)[None] for each in (latents, control))
    prediction = model(
        noisy,
        torch.tensor([1000 * TIMES[number]]),
        torch.from_numpy(padded),
        control_hidden_states=control,
        control_hidden_states_scale=torch.tensor(STRENGTHS[number]),
        return_dict=False,
    )[0][0].permute(1, 2, 3, 0)
    return prediction, (prediction * torch.from_numpy(weights)).sum()


def pack(arrays, fill):
    """Return arrays of clips in one row with padding, and their segments."""
    padding = np.full((3, *arrays[0].shape[1:]), fill, np.float32)
    segments = [np.full(len(array), index + 1) for index, array in enumerate(arrays)]
    return jnp.asarray(np.concatenate([*arrays, padding]))[None], jnp.asarray(np.concatenate([*segments, [0] * 3]))[
        None
    ]


def predict_ours(config, params):
    """Return our prediction for a row of both clips, and the gradient of its weighted sum."""
    clips = [draw_clip(number) for number in range(2)]
    noisy, control, weights = ([patchify(clip[part], PATCH) for clip in clips] for part in range(3))
    noisy, segments = pack(noisy, 2)
    positions = pack([compute_positions(grid) for grid in GRIDS], 2)[0]
    layout = PackedRows(segments=segments.astype(jnp.int32), positions=positions, count=3)
    text, text_segments = pack([clip[3] for clip in clips], 2)
    strengths = jnp.asarray([[*STRENGTHS, (7.0, 7.0)]])
    conditioning = Conditioning(TextTokens(text, text_segments), ControlLatents(pack(control, 2)[0], strengths))
    graph = get_graph_def(config.make)

    @jax.jit
    def differentiate(params):
        def loss(params):
            prediction, _ = nnx.merge(graph, params)(noisy, jnp.asarray([[*TIMES, 0.5]]), layout, conditioning)
            return (prediction * pack(weights, 0)[0]).sum(), prediction

        return jax.grad(loss, has_aux=True)(params)

    gradient, prediction = differentiate(params)
    return prediction[0], gradient


@pytest.mark.parametrize("remat", ["none", "full"])
def test_values_and_gradients_equal_diffusers(torch, model, folder, remat):
    config, params = load_denoiser(folder)
    assert config.hint_layers == (0, 2)
    config = config.replace(attention="dense", remat=remat)
    prediction, gradient = predict_ours(config, params)

    start = 0
    model.zero_grad()
    for number in range(2):
        expected, loss = predict_theirs(torch, model, number)
        loss.backward()
        expected = patchify(expected.detach().numpy(), PATCH)
        assert expected.std() > 0.1
        np.testing.assert_allclose(prediction[start : start + len(expected)], expected, atol=1e-4)
        start += len(expected)

    names = find_format(config).make_tensor_map(config, "diffusers")
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


def test_folders_come_back_bit_for_bit(tmp_path, torch, model, folder):
    from safetensors.torch import load_file

    config, params = load_denoiser(folder)
    save_denoiser(tmp_path / "out", config, params)
    again = type(model).from_config(json.loads((tmp_path / "out" / "config.json").read_text()))
    again.load_state_dict(load_file(tmp_path / "out" / FILE))
    for (name, left), (_, right) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(left, right), name
    written, rewritten = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "out"))
    assert rewritten == {name: value for name, value in written.items() if name != "_diffusers_version"}


def test_the_authors_names_are_those_that_diffusers_converts(tmp_path, torch, model, folder):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    from safetensors.torch import load_file

    config, params = load_denoiser(folder)
    save_denoiser(tmp_path / "authors", config, params, layout="authors")
    converted = convert_wan_transformer_to_diffusers(load_file(tmp_path / "authors" / FILE))
    expected = model.state_dict()
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(converted[name], tensor), name


def test_diffusers_gives_the_same_predictions_from_written_adapters(tmp_path, torch, model, folder):
    """The adapter has all kernels of the blocks and of the control layers, with the map before the first of these."""
    pytest.importorskip("peft")
    import diffusers

    config, params = load_denoiser(folder)
    targets = (r"^(control/)?blocks/.*kernel$", "^control/input/kernel$")
    lora, draw = LoraConfig(rank=3, alpha=4.5, targets=targets), np.random.default_rng(0)
    factors = map_with_path(
        lambda _, leaf: 0.1 * draw.normal(size=leaf.shape).astype(np.float32), init_lora(params, lora, key(0, "lora"))
    )
    adapter = add_lora_scale(factors, lora.scale)
    save_lora(tmp_path / "lora.safetensors", adapter, get_lora_modules(config))
    state, metadata = diffusers.WanVACEPipeline.lora_state_dict(
        str(tmp_path), weight_name="lora.safetensors", return_lora_metadata=True
    )
    adapted = type(model).from_pretrained(folder).eval()
    diffusers.WanVACEPipeline.load_lora_into_transformer(state, adapted, metadata=metadata)
    with torch.no_grad():
        plain, expected = (patchify(predict_theirs(torch, each, 0)[0].numpy(), PATCH) for each in (model, adapted))
    assert np.abs(expected - plain).max() > 0.1
    prediction, _ = predict_ours(config.replace(attention="dense"), merge_lora(params, adapter))
    np.testing.assert_allclose(prediction[: len(expected)], expected, atol=1e-4)
