"""Pipelines of LTX-Video give the latents of diffusers from the same folder, noise, prompts and pictures.

In two things ours differ: the text encoders of `LTXPipeline` and `LTXImageToVideoPipeline` see the padding of texts,
which those of the authors and of `LTXConditionPipeline` do not, and get the mask here; all pipelines sample the latents
of pictures from the autoencoder's posterior, and get its mean here.
"""

import jax
import numpy as np
import pytest

import dit_video
from dit_video.core.rng import key
from dit_video.sampling.request import Condition
from dit_video.tokens import PackedRows
from dit_video.video import Clip
from support.latents import generate_latents
from support.tiny_t5 import write_tokenizer
from support.torch_models import TEXT, randomize

pytestmark = pytest.mark.parity

PROMPT, NEGATIVE = "a red ball and a green cube moves left", "the table"
SIZE, STEPS, GUIDANCE, FPS = (25, 64, 96), 4, 3.0, 25
GRID = (4, 2, 3)
CHANNELS = 6
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "caption_channels": 24,
    "num_layers": 2,
}
VAE = {
    "latent_channels": CHANNELS,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (0, 0, 0, 0, 1),
    "decoder_layers_per_block": (0, 0, 0, 0, 1),
}
VAE_095 = {
    "latent_channels": CHANNELS,
    "block_out_channels": (8, 8, 8, 16, 16),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "layers_per_block": (0, 0, 0, 0, 1),
    "spatio_temporal_scaling": (True,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (0, 0, 0, 1),
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (False,) * 4,
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3,
    "timestep_conditioning": True,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
"""The autoencoder of versions from 0.9.5 on, in small."""


def save_pipeline(torch, folder, kind, *, vae=VAE, **scheduler):
    """Let diffusers make and save a random pipeline of the class `kind`."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    write_tokenizer(folder / "words")
    text = randomize(torch, transformers.T5EncoderModel(transformers.T5Config(**TEXT)), 0)
    vae = randomize(torch, diffusers.AutoencoderKLLTXVideo(**vae), 1)
    vae.latents_mean.normal_(std=0.3)
    vae.latents_std.uniform_(0.5, 1.5)
    pipe = getattr(diffusers, kind)(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "words"),
        text_encoder=text,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        transformer=randomize(torch, diffusers.LTXVideoTransformer3DModel(**TRANSFORMER), 3),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "pipeline")
    if kind != "LTXConditionPipeline":
        encode_ids = text.forward
        text.forward = lambda ids, attention_mask=None: encode_ids(ids, attention_mask=(ids != 0).long())
    return pipe


@pytest.fixture(autouse=True)
def _use_the_mean_of_latents(monkeypatch):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def make_noise(seed=0, shape=(*GRID, CHANNELS)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_theirs(torch, latents):
    """Return latents `[t h w c]` as `[1 c t h w]`."""
    return torch.from_numpy(np.array(latents)).permute(3, 0, 1, 2)[None]


def theirs(torch, pipe, *, packed, **options):
    """Return the latents `[t h w c]` of diffusers."""
    frames, height, width = SIZE
    result = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        num_frames=frames,
        height=height,
        width=width,
        frame_rate=FPS,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type="latent",
        **options,
    ).frames
    return result[0].reshape(*GRID, CHANNELS).numpy() if packed else result[0].permute(1, 2, 3, 0).numpy()


def ours(pipeline, noise, **options):
    overrides = {"steps": STEPS, "guidance": GUIDANCE, "negative": NEGATIVE}
    return generate_latents(pipeline, PROMPT, size=SIZE, noise=noise, **overrides, **options)


def assert_equal(actual, expected, noise):
    assert np.abs(expected - noise).std() > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-3)


def draw_image(seed):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE[1:], 3), dtype=np.uint8)


PUBLISHED = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
"""Scheduler of versions 0.9.0 and 0.9.1."""


def test_text_to_video_equals_diffusers(torch, tmp_path):
    pipe = save_pipeline(torch, tmp_path, "LTXPipeline", **PUBLISHED)
    noise, pipeline = make_noise(), dit_video.load(tmp_path / "pipeline", dtype="float32")
    expected = theirs(torch, pipe, packed=True, latents=torch.from_numpy(noise.reshape(1, -1, CHANNELS)))
    assert_equal(ours(pipeline, noise), expected, noise)


def test_a_first_image_equals_diffusers(torch, tmp_path, monkeypatch):
    from PIL import Image

    pipe = save_pipeline(torch, tmp_path, "LTXImageToVideoPipeline", **PUBLISHED)
    noise, pipeline, image = make_noise(), dit_video.load(tmp_path / "pipeline", dtype="float32"), draw_image(1)
    replace_noise(monkeypatch, pipe, [to_theirs(torch, noise)])
    expected = theirs(torch, pipe, packed=True, image=Image.fromarray(image))
    result = ours(pipeline, noise, image=image)
    assert_equal(result, expected, noise)
    np.testing.assert_allclose(result[:1], pipeline.encode(Clip(image[None], fps=1.0)), atol=1e-5)


def replace_noise(monkeypatch, pipe, draws):
    """Let the pipeline draw these arrays in turn."""
    remaining = list(draws)
    draw = lambda shape, **_: remaining.pop(0).reshape(shape)  # noqa: E731
    monkeypatch.setattr(f"{type(pipe).__module__}.randn_tensor", draw)


CONDITIONS = {
    "without": (),
    "weak first and strong last image": ((1, 0, 0.6), (1, 24, 1.0)),
    "images at any frame": ((1, 3, 1.0), (1, 21, 0.7)),
    "first image and a weak clip after it": ((1, 0, 1.0), (9, 8, 0.8)),
    "clip at the start": ((9, 0, 1.0),),
    "clip with latents of its own": ((17, 8, 0.8),),
}
"""Frames, first frame and strength of each."""


@pytest.fixture(scope="module")
def condition_pipelines(torch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditions")
    pipe = save_pipeline(torch, folder, "LTXConditionPipeline")
    return pipe, dit_video.load(folder / "pipeline", dtype="float32")


@pytest.mark.parametrize("kind", CONDITIONS)
def test_conditions_equal_diffusers(torch, condition_pipelines, monkeypatch, kind):
    assert_equal_with_conditions(torch, condition_pipelines, monkeypatch, CONDITIONS[kind])


def test_a_folder_of_version_095_equals_the_pipeline_with_conditions(torch, tmp_path, monkeypatch):
    """diffusers' conversion saves this version as `LTXPipeline`, whose positions and times are those of the first."""
    import diffusers

    pipe = save_pipeline(torch, tmp_path, "LTXPipeline", vae=VAE_095)
    pipe = diffusers.LTXConditionPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    pipelines = pipe, dit_video.load(tmp_path / "pipeline", dtype="float32")
    assert_equal_with_conditions(torch, pipelines, monkeypatch, ((1, 0, 0.6), (9, 16, 1.0)))


def assert_equal_with_conditions(torch, pipelines, monkeypatch, pictures):
    """Compare both for pictures, each with its number of frames, its first frame and its strength."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
    from PIL import Image

    pipe, pipeline = pipelines
    noise, seed, extra = make_noise(), 5, 0
    their_conditions, conditions, lengths = [], [], []
    for number, (frames, start, strength) in enumerate(pictures):
        pixels = np.stack([draw_image(10 * number + frame) for frame in range(frames)])
        images = [Image.fromarray(frame) for frame in pixels]
        content = {"image": images[0]} if frames == 1 else {"video": images}
        their_conditions.append(LTXVideoCondition(**content, frame_index=start, strength=strength))
        conditions.append(Condition(content=Clip(pixels, fps=FPS), frame=start, strength=strength))
        lengths += [min(2, 1 + (frames - 1) // 8)] if start else []
    draws, tokens = [to_theirs(torch, noise)], GRID[1] * GRID[2]
    drawn = np.asarray(jax.random.normal(key(seed, "conditions"), (tokens * sum(lengths), CHANNELS)))
    for length in lengths:
        part = drawn[extra * tokens : (extra + length) * tokens].reshape(length, *GRID[1:], CHANNELS)
        draws.append(to_theirs(torch, part))
        extra += length
    replace_noise(monkeypatch, pipe, draws)
    options = {"conditions": their_conditions} if conditions else {}
    expected = theirs(torch, pipe, packed=False, image_cond_noise_scale=0.0, **options)
    conditioner = type(pipeline.config.conditioner)(noise_scale=0.0)
    assert_equal(ours(pipeline, noise, conditions=conditions, conditioner=conditioner, seed=seed), expected, noise)


def test_the_noise_of_kept_images_equals_diffusers(torch, condition_pipelines, monkeypatch):
    """diffusers leaves the last step's noise in the kept image, which is left out of the comparison."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
    from PIL import Image

    pipe, pipeline = condition_pipelines
    noise, seed, image = make_noise(), 5, draw_image(1)
    tokens = noise.reshape(1, -1, CHANNELS)
    layout = PackedRows(
        segments=np.ones(tokens.shape[:2], np.int32), positions=np.zeros((*tokens.shape[:2], 3)), count=1
    )
    steps = [jax.random.fold_in(key(seed, "sampler"), number)[None, None] for number in range(STEPS - 1)]
    drawn = [np.array(layout.sample_noise(each, CHANNELS)) for each in steps]
    replace_noise(monkeypatch, pipe, [to_theirs(torch, noise), *map(torch.from_numpy, [tokens, *drawn])])
    condition = LTXVideoCondition(image=Image.fromarray(image))
    expected = theirs(torch, pipe, packed=False, conditions=[condition], image_cond_noise_scale=0.15)
    assert pipeline.config.conditioner.noise_scale == 0.15
    result = ours(pipeline, noise, image=image, seed=seed)
    assert_equal(result[1:], expected[1:], noise[1:])
    without = ours(pipeline, noise, image=image, seed=seed, conditioner=type(pipeline.config.conditioner)())
    assert np.abs(without - result)[1:].max() > 2e-3
