"""Pipelines of DiT equal diffusers from the same folder, noise and classes, in final latents and images."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dit_video
from dit_video.core.rng import key
from dit_video.tokens import (
    Grid,
    PackedExample,
    PackedShape,
    compute_positions,
    pack,
    patchify,
    unpatchify,
)
from support.latents import generate_latents

pytestmark = pytest.mark.parity

CHANNELS, SIDE, PATCH = 4, 8, Grid(1, 2, 2)
LABEL, STEPS, SEED = 207, 6, 3
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": 2 * CHANNELS,
    "num_layers": 2,
    "sample_size": SIDE,
    "num_embeds_ada_norm": 1000,  # its null class is fixed in the pipeline of diffusers
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "latent_channels": CHANNELS,
}


def save_pipeline(torch, folder, scheduler):
    """Let diffusers make and save a random pipeline, and return it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**TRANSFORMER).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:  # as all published models have it
        block.norm1.emb.load_state_dict(first)
    pipe = diffusers.DiTPipeline(model, diffusers.AutoencoderKL(**VAE).eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())  # published ones are written by hand
    names = {str(LABEL): "golden retriever, retriever"}
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
    return pipe


def draw_step_noise(number):
    """Return the noise `[c h w]` that our sampler draws in a step."""
    grid = Grid(1, SIDE // 2, SIDE // 2)
    zeros = patchify(np.zeros((1, SIDE, SIDE, CHANNELS), np.float32), PATCH)
    item = PackedExample(zeros, compute_positions(grid), np.zeros(1, np.int32), 0)
    row = pack([item], PackedShape(tokens=grid.volume, text=1, segments=1), width=zeros.shape[1])
    keys = jax.random.fold_in(key(SEED, "sampler"), number)[None, None]
    batch = jax.tree.map(lambda value: jnp.asarray(value)[None], row)
    noise = batch.layout.sample_noise(keys, batch.tokens.shape[-1])
    return unpatchify(np.asarray(noise[0]), grid, PATCH)[0].transpose(2, 0, 1)


def theirs(torch, pipe, noise, guidance, monkeypatch):
    """Return the final latents `[h w c]` of diffusers, and their image in 0..255."""
    drawn, decoded = [], []

    def return_noise(shape, **_):
        image = noise[0].transpose(2, 0, 1) if not drawn else draw_step_noise(len(drawn) - 1)
        drawn.append(shape)
        return torch.from_numpy(np.broadcast_to(image, tuple(shape)).copy())

    for module in (type(pipe).__module__, type(pipe.scheduler).__module__):
        monkeypatch.setattr(importlib.import_module(module), "randn_tensor", return_noise)
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda latents: decoded.append(latents) or decode(latents))
    image = pipe([LABEL], guidance_scale=guidance, num_inference_steps=STEPS, output_type="np").images[0]
    latents = pipe.vae.config.scaling_factor * decoded[0][0]
    return latents.numpy().transpose(1, 2, 0), 255 * image


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["ddim", "ddpm", "learned_range"])
def test_final_latents_and_images_equal_those_of_diffusers(tmp_path, torch, monkeypatch, kind, guidance):
    diffusers = pytest.importorskip("diffusers")
    if kind == "ddim":
        scheduler = diffusers.DDIMScheduler(clip_sample=False)
    else:
        variance = "learned_range" if kind == "learned_range" else "fixed_small"
        scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type=variance)
    pipe = save_pipeline(torch, tmp_path, scheduler)
    if kind == "learned_range":
        # Otherwise their pipeline drops the variance, which their scheduler needs.
        pipe.transformer.register_to_config(out_channels=CHANNELS)
    noise = np.random.default_rng(0).standard_normal((1, SIDE, SIDE, CHANNELS)).astype(np.float32)
    expected, image = theirs(torch, pipe, noise, guidance, monkeypatch)

    pipeline = dit_video.load(tmp_path, dtype="float32")
    kwargs = {"steps": STEPS, "guidance": guidance, "noise": noise, "seed": SEED}
    result = generate_latents(pipeline, "golden retriever", **kwargs)[0]
    assert np.abs(expected - noise[0]).std() > 0.1
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-3)
    frame = pipeline.generate(LABEL, **kwargs).frames[0].astype(float)
    assert np.abs(frame - image).max() < 1.5
