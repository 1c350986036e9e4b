"""Files that fine-tuning writes give the same predictions in diffusers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.rng import key
from dit_video.core.trees import map_with_path
from dit_video.experiment import export
from dit_video.families import save_denoiser
from dit_video.families.family import DENOISER_FOLDERS
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import LoraConfig, add_lora_scale, get_graph_def, init_lora, merge_lora
from dit_video.tokens import Grid, PackedRows, compute_positions, patchify, unpatchify
from support.random_params import make_random_params

pytestmark = pytest.mark.parity

DIT = WanDitConfig(channels=4, context_width=16, width=32, mlp_dim=40, layers=2, heads=2, time_width=8)
GRID, TEXT, TIME = Grid(2, 3, 2), 5, 0.7
PARAMS = {"backbone": make_random_params(DIT.make), "text": {}}
LORA = LoraConfig(rank=3, alpha=4.5, targets=(r"^backbone/blocks/.*kernel$", "backbone/head/kernel"))
DRAW = np.random.default_rng(0)
LATENTS = DRAW.normal(size=(2, 6, 4, 4)).astype(np.float32)
CONTEXT = DRAW.normal(size=(TEXT, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch")
    module.set_num_threads(1)
    return module


def ours(params):
    segments, positions = jnp.ones((1, GRID.volume), jnp.int32), jnp.asarray(compute_positions(GRID)[None])
    prediction, _ = nnx.merge(get_graph_def(DIT.make), params["backbone"])(
        jnp.asarray(patchify(LATENTS, DIT.patch)[None]),
        jnp.full((1, 1), TIME),
        PackedRows(segments=segments, positions=positions, count=1),
        Conditioning(TextTokens(jnp.asarray(CONTEXT)[None], jnp.ones((1, TEXT), jnp.int32))),
    )
    return unpatchify(np.asarray(prediction[0]), GRID, DIT.patch)


def theirs(torch, model):
    text = np.zeros((1, 512, 16), np.float32)
    text[0, :TEXT] = CONTEXT
    with torch.no_grad():
        prediction = model(
            torch.from_numpy(LATENTS).permute(3, 0, 1, 2)[None],
            torch.tensor([1000 * TIME]),
            torch.from_numpy(text),
            return_dict=False,
        )[0][0]
    return prediction.permute(1, 2, 3, 0).numpy()


def test_diffusers_gives_the_same_predictions_from_written_adapters(torch, tmp_path):
    pytest.importorskip("peft")
    import diffusers

    factors = map_with_path(
        lambda _, leaf: DRAW.normal(size=leaf.shape).astype(np.float32) * 0.3, init_lora(PARAMS, LORA, key(0, "lora"))
    )
    adapter = add_lora_scale(factors, LORA.scale)
    save_denoiser(tmp_path / "transformer", DIT, PARAMS["backbone"])
    export.save_adapter(tmp_path, DIT, adapter, PARAMS)
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer").eval()
    plain = theirs(torch, model)
    state, metadata = diffusers.WanPipeline.lora_state_dict(str(tmp_path), return_lora_metadata=True)
    diffusers.WanPipeline.load_lora_into_transformer(state, model, metadata=metadata)
    expected = theirs(torch, model)
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(ours(merge_lora(PARAMS, adapter)), expected, atol=1e-4)


def test_diffusers_gives_the_same_predictions_from_written_weights(torch, tmp_path):
    import diffusers

    trained = dataclasses.replace(DIT, dtype="bfloat16", remat="full")
    export.save_transformer(tmp_path, trained, PARAMS)
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / DENOISER_FOLDERS["backbone"]).eval()
    np.testing.assert_allclose(ours(PARAMS), theirs(torch, model), atol=1e-4)
