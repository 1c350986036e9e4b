"""Pipelines of Wan give the latents of diffusers from the same folder, noise, prompts and four steps of UniPC."""

import importlib.util
import types

import numpy as np
import pytest

import dit_video
from support.latents import generate_latents
from support.tiny_t5 import write_tokenizer
from support.torch_models import TEXT, randomize

pytestmark = pytest.mark.parity

PROMPT, NEGATIVE = "a  red ball &amp; a green cube moves left", "the table"
SIZE, STEPS, GUIDANCE = (9, 48, 80), 4, 5.0
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "ffn_dim": 40,
    "num_layers": 2,
    "freq_dim": 32,
}
VAE = {"base_dim": 8, "z_dim": 4, "latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [1.5, 1.0, 2.0, 1.0]}


def save_pipeline(torch, folder, *, kind="WanPipeline", transformer=TRANSFORMER, vae=VAE, scheduler=None, **index):
    """Let diffusers make and save a random pipeline, with the arguments `index` of its class `kind`."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    write_tokenizer(folder / "words")
    text = transformers.UMT5EncoderModel(transformers.UMT5Config(**TEXT))
    if index.get("boundary_ratio") is not None:
        index["transformer_2"] = randomize(torch, diffusers.WanTransformer3DModel(**transformer), 2)
    pipe = getattr(diffusers, kind)(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "words"),
        text_encoder=randomize(torch, text, 0),
        vae=randomize(torch, diffusers.AutoencoderKLWan(**vae), 1),
        scheduler=scheduler
        or diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer=randomize(torch, diffusers.WanTransformer3DModel(**transformer), 3),
        **index,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "pipeline")
    return pipe


def noise_for(pipe, channels, size=SIZE):
    stride = (pipe.vae_scale_factor_temporal, *[pipe.vae_scale_factor_spatial] * 2)
    shape = [1 + (size[0] - 1) // stride[0], size[1] // stride[1], size[2] // stride[2], channels]
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def theirs(torch, pipe, noise, size=SIZE, **options):
    """Return the latents `[t h w c]` of diffusers."""
    frames, height, width = size
    result = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        **{"guidance_scale": GUIDANCE} | options,
        latents=torch.from_numpy(noise).permute(3, 0, 1, 2)[None],
        output_type="latent",
    )
    return result.frames[0].permute(1, 2, 3, 0).float().numpy()


def ours(pipeline, noise, size=SIZE, **options):
    return generate_latents(
        pipeline, PROMPT, size=size, steps=STEPS, **{"guidance": GUIDANCE} | options, negative=NEGATIVE, noise=noise
    )


def assert_equal(actual, expected, noise):
    assert np.abs(expected - noise).std() > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-3)


@pytest.fixture(scope="module")
def text_to_video(torch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t2v")
    return save_pipeline(torch, folder), folder / "pipeline"


def test_text_to_video_equals_diffusers(torch, text_to_video):
    pipe, folder = text_to_video
    noise, pipeline = noise_for(pipe, 4), dit_video.load(folder, dtype="float32")
    expected = theirs(torch, pipe, noise)
    assert_equal(ours(pipeline, noise), expected, noise)
    assert np.abs(theirs(torch, pipe, noise, guidance_scale=1.0) - expected).max() > 1e-2
    assert_equal(ours(pipeline, noise, guidance=1.0), theirs(torch, pipe, noise, guidance_scale=1.0), noise)


def test_two_experts_equal_diffusers(torch, tmp_path):
    """With a shift of 3, the first two of the four steps are above the boundary."""
    pipe = save_pipeline(torch, tmp_path, boundary_ratio=0.875)
    noise, pipeline = noise_for(pipe, 4), dit_video.load(tmp_path / "pipeline", dtype="float32")
    expected = theirs(torch, pipe, noise, guidance_scale_2=3.0)
    assert_equal(ours(pipeline, noise, guidance=(GUIDANCE, 3.0)), expected, noise)
    assert np.abs(theirs(torch, pipe, noise) - expected).max() > 1e-2
    assert_equal(ours(pipeline, noise), theirs(torch, pipe, noise), noise)


WAN22 = {
    "base_dim": 8,
    "decoder_base_dim": 12,
    "z_dim": 4,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [0.2] * 4,
    "latents_std": [1.5] * 4,
}


def test_a_time_per_token_equals_diffusers(torch, tmp_path):
    size = (9, 64, 96)
    pipe = save_pipeline(torch, tmp_path, vae=WAN22, expand_timesteps=True)
    noise, pipeline = noise_for(pipe, 4, size), dit_video.load(tmp_path / "pipeline", dtype="float32")
    assert pipeline.config.model.backbone.time == "token"
    assert_equal(ours(pipeline, noise, size), theirs(torch, pipe, noise, size), noise)


def test_another_scheduler_equals_diffusers(torch, tmp_path):
    import diffusers

    pipe = save_pipeline(torch, tmp_path, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0))
    noise, pipeline = noise_for(pipe, 4), dit_video.load(tmp_path / "pipeline", dtype="float32")
    assert_equal(ours(pipeline, noise), theirs(torch, pipe, noise), noise)


@pytest.mark.parametrize("style", ["diffusers", "comfyui"])
def test_adapters_and_a_shift_equal_diffusers(torch, text_to_video, tmp_path, style):
    pytest.importorskip("peft")
    import safetensors.torch

    pipe, folder = text_to_video
    modules = {
        "diffusers": ["attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"],
        "comfyui": ["self_attn.q", "self_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2"],
    }[style]
    generator, names, files = torch.Generator().manual_seed(0), ("first", "second"), []
    for name in names:
        tensors = {}
        for module in (f"blocks.{layer}.{module}" for layer in range(2) for module in modules):
            wide_in, wide_out = (40 if part in module else 32 for part in ("ffn.net.2", "ffn.net.0"))
            if style == "comfyui":
                wide_in, wide_out = (40 if module.endswith(part) else 32 for part in ("ffn.2", "ffn.0"))
            prefix = "transformer" if style == "diffusers" else "diffusion_model"
            shapes = {"lora_A": (3, wide_in), "lora_B": (wide_out, 3)}
            tensors |= {
                f"{prefix}.{module}.{part}.weight": 0.2 * torch.randn(shape, generator=generator)
                for part, shape in shapes.items()
            }
            if style == "comfyui":
                tensors[f"{prefix}.{module}.diff_b"] = 0.2 * torch.randn(wide_out, generator=generator)
        files.append(tmp_path / f"{name}.safetensors")
        safetensors.torch.save_file(tensors, files[-1])
    noise, pipeline = noise_for(pipe, 4), dit_video.load(folder, dtype="float32")
    for name, file in zip(names, files, strict=True):
        pipe.load_lora_weights(str(file), adapter_name=name)
    pipe.set_adapters(list(names), [0.7, -0.4])
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config, flow_shift=5.0)
    expected = theirs(torch, pipe, noise)
    pipe.unload_lora_weights()
    pipe.scheduler = scheduler
    assert np.abs(expected - theirs(torch, pipe, noise)).max() > 1e-2
    adapted = pipeline.load_lora(files[0], 0.7).load_lora(files[1], -0.4)
    assert_equal(ours(adapted, noise, shift=5), expected, noise)


# An image that the clip begins with.

VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 20,
    "patch_size": 5,
    "hidden_act": "gelu",
}
BESIDE = TRANSFORMER | {"in_channels": 4 + 4 + 4}
SEEN = BESIDE | {"image_dim": 24, "added_kv_proj_dim": 32}
ANIMATED = {
    "2.1": {"transformer": SEEN},
    "2.1 first and last": {"transformer": SEEN | {"pos_embed_seq_len": 2 * 17}},
    "2.2": {"transformer": BESIDE, "boundary_ratio": 0.9},
    "2.2 first and last": {"transformer": BESIDE, "boundary_ratio": 0.9},
    "2.2 TI2V": {"vae": WAN22, "expand_timesteps": True},
}


@pytest.mark.parametrize("kind", ANIMATED)
def test_image_to_video_equals_diffusers(torch, tmp_path, monkeypatch, kind):
    import transformers
    from PIL import Image

    if importlib.util.find_spec("ftfy") is None:  # only this pipeline needs it, and the text has no errors to fix
        as_it_is = types.SimpleNamespace(fix_text=lambda text: text)
        monkeypatch.setattr("diffusers.pipelines.wan.pipeline_wan_i2v.ftfy", as_it_is, raising=False)

    options, last = dict(ANIMATED[kind]), "last" in kind
    if "2.1" in kind:
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
        options["image_encoder"] = randomize(torch, tower, 4)
        options["image_processor"] = transformers.CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=20)
    pipe = save_pipeline(torch, tmp_path, kind="WanImageToVideoPipeline", **options)
    size = (9, 64, 96) if kind == "2.2 TI2V" else SIZE
    noise, pipeline = noise_for(pipe, 4, size), dit_video.load(tmp_path / "pipeline", dtype="float32")
    images = np.random.default_rng(5).integers(0, 256, (2, *size[1:], 3), dtype=np.uint8)
    pictures = [Image.fromarray(image) for image in images]
    expected = theirs(torch, pipe, noise, size, image=pictures[0], **{"last_image": pictures[1]} if last else {})
    result = ours(pipeline, noise, size, image=images[0], **{"last_image": images[1]} if last else {})
    assert_equal(result, expected, noise)
    other = ours(pipeline, noise, size, image=images[1], **{"last_image": images[0]} if last else {})
    assert np.abs(other - expected).max() > 1e-2
