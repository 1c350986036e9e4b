"""Packed rows of LTX-Video equal batches of one of `LTXVideoTransformer3DModel`, in values and gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.rng import key
from dit_video.core.trees import flatten, map_with_path
from dit_video.families import save_denoiser
from dit_video.families.ltx.transformer import LtxDenoiserFormat, make_ltx_tensor_map
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import LoraConfig, add_lora_scale, get_graph_def, init_lora, merge_lora
from dit_video.tokens import Grid, PackedRows, compute_positions
from dit_video.weights import save_lora

pytestmark = pytest.mark.parity

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "in_channels": 6,
    "out_channels": 6,
    "caption_channels": 10,
    "num_layers": 2,
}
GRIDS, TEXTS, TIMES = (Grid(3, 2, 4), Grid(1, 3, 2)), (7, 3), (0.937, 0.25)
FPS, STRIDE, MAX_TEXT = 25, 8, 12


class Clip:
    """One clip with all inputs of a model: its first frame is at a time of its own."""

    def __init__(self, number):
        draw = np.random.default_rng(number)
        self.grid, time = GRIDS[number], np.full(GRIDS[number], TIMES[number], np.float32)
        time[0] = 0.1
        self.times = time.reshape(-1)
        self.tokens = draw.normal(size=(self.grid.volume, SMALL["in_channels"])).astype(np.float32)
        self.weights = draw.normal(size=self.tokens.shape).astype(np.float32)
        self.text = draw.normal(size=(TEXTS[number], SMALL["caption_channels"])).astype(np.float32)
        self.positions = compute_positions(self.grid, step=(STRIDE / FPS, 1.0, 1.0))


@pytest.fixture(scope="module")
def model(torch):
    """Return a model of diffusers whose parameters are all random."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.LTXVideoTransformer3DModel(**SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def theirs_on(torch, model, clip):
    """Return the prediction of diffusers for one clip, whose text is padded and masked, and its weighted sum."""
    text = np.full((1, MAX_TEXT, clip.text.shape[1]), 3, np.float32)
    text[0, : len(clip.text)] = clip.text
    mask = torch.from_numpy((np.arange(MAX_TEXT) < len(clip.text))[None])
    prediction = model(
        torch.from_numpy(clip.tokens)[None],
        torch.from_numpy(text),
        torch.from_numpy(1000 * clip.times[None]),
        mask,
        num_frames=clip.grid.t,
        height=clip.grid.h,
        width=clip.grid.w,
        rope_interpolation_scale=(STRIDE / FPS, 32, 32),
        return_dict=False,
    )[0][0]
    return prediction, (prediction * torch.from_numpy(clip.weights)).sum()


def pack_clips(clips):
    """Pack the clips into one row, with padding that is not zero."""
    row = {}
    for name in ("tokens", "weights", "positions", "times", "text"):
        arrays = [getattr(clip, name) for clip in clips]
        padding = np.full((3, *arrays[0].shape[1:]), 0 if name == "weights" else 2, np.float32)
        row[name] = jnp.asarray(np.concatenate([*arrays, padding]))[None]
        ids = [np.full(len(array), index + 1, np.int32) for index, array in enumerate(arrays)]
        row[f"{name} segments"] = jnp.asarray(np.concatenate([*ids, np.zeros(3, np.int32)]))[None]
    return row


def ours_on(config, params, row):
    """Return our prediction for a row, and the gradient of its weighted sum."""
    conditioning = Conditioning(TextTokens(row["text"], row["text segments"]))
    layout = PackedRows(segments=row["tokens segments"], positions=row["positions"], count=3)
    graph = get_graph_def(config.make)

    def loss(params):
        prediction, _ = nnx.merge(graph, params)(row["tokens"], row["times"], layout, conditioning)
        return (prediction * row["weights"]).sum(), prediction

    gradient, prediction = jax.jit(jax.grad(loss, has_aux=True))(params)
    return prediction[0], gradient


def test_values_and_gradients_equal_diffusers(tmp_path, torch, model):
    model.save_pretrained(tmp_path)
    config, params = LtxDenoiserFormat().load(tmp_path)
    clips = [Clip(number) for number in range(2)]
    prediction, gradient = ours_on(config.replace(attention="dense"), params, pack_clips(clips))

    start = 0
    for clip in clips:
        expected, loss = theirs_on(torch, model, clip)
        loss.backward()
        expected = expected.detach().numpy()
        assert expected.std() > 0.1
        np.testing.assert_allclose(prediction[start : start + len(expected)], expected, atol=1e-4)
        start += len(expected)

    names = make_ltx_tensor_map(config)
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
            tolerance = 2e-3 if ".attn2." in name else 1e-3
            assert np.abs(result - expected).max() <= tolerance * scale, name
    assert not expected_gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folders_come_back_bit_for_bit(tmp_path, torch, model, caplog, dtype):
    """Our config has one more setting, which diffusers ignores without a warning."""
    import diffusers

    model = diffusers.LTXVideoTransformer3DModel.from_config(model.config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    config, params = LtxDenoiserFormat().load(tmp_path / "in", dtype=None)
    save_denoiser(tmp_path / "out", config, params)
    again = type(model).from_pretrained(tmp_path / "out", torch_dtype=getattr(torch, dtype))
    for (name, left), (_, right) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(left, right), name
    written, rewritten = (json.loads((tmp_path / way / "config.json").read_text()) for way in ("in", "out"))
    expected = {name: value for name, value in written.items() if name != "_diffusers_version"}
    assert rewritten == expected | {"_causal_temporal_positioning": False}
    assert not [record for record in caplog.records if "positioning" in record.getMessage()]


def test_diffusers_gives_the_same_predictions_from_written_adapters(tmp_path, torch, model):
    """The adapter has all kernels, so that each name, also outside of the blocks, is one that diffusers knows."""
    pytest.importorskip("peft")
    import diffusers

    model.save_pretrained(tmp_path / "transformer")
    config, params = LtxDenoiserFormat().load(tmp_path / "transformer")
    lora, draw = LoraConfig(rank=3, alpha=4.5, targets=("kernel$",)), np.random.default_rng(0)
    factors = map_with_path(
        lambda _, leaf: 0.1 * draw.normal(size=leaf.shape).astype(np.float32), init_lora(params, lora, key(0, "lora"))
    )
    adapter = add_lora_scale(factors, lora.scale)
    save_lora(tmp_path / "lora.safetensors", adapter, LtxDenoiserFormat().get_lora_modules(config))
    state, metadata = diffusers.LTXPipeline.lora_state_dict(
        str(tmp_path), weight_name="lora.safetensors", return_lora_metadata=True
    )
    adapted = type(model).from_pretrained(tmp_path / "transformer").eval()
    diffusers.LTXPipeline.load_lora_into_transformer(state, adapted, metadata=metadata)
    clip = Clip(0)
    with torch.no_grad():
        plain, expected = (theirs_on(torch, each, clip)[0].numpy() for each in (model, adapted))
    assert np.abs(expected - plain).max() > 0.1
    config = config.replace(attention="dense")
    prediction, _ = ours_on(config, merge_lora(params, adapter), pack_clips([clip]))
    np.testing.assert_allclose(prediction[: len(expected)], expected, atol=1e-4)
