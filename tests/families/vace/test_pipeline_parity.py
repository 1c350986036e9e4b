"""Pipelines of VACE give the latents of diffusers from the same folder, noise, prompts, clips and steps of UniPC."""

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
SIZE, STEPS, GUIDANCE = (9, 48, 80), 3, 5.0
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "ffn_dim": 40,
    "num_layers": 4,
    "freq_dim": 32,
    "vace_layers": [0, 2],
    "vace_in_channels": 2 * 4 + 64,
}
VAE = {"base_dim": 8, "z_dim": 4, "latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [1.5, 1.0, 2.0, 1.0]}


@pytest.fixture(scope="module")
def pipelines(torch, tmp_path_factory):
    """Return a random pipeline of diffusers, and ours of the folder that it writes."""
    import diffusers
    import transformers
    from diffusers.pipelines.wan import pipeline_wan_vace

    if importlib.util.find_spec("ftfy") is None:  # the text has no errors to fix
        pipeline_wan_vace.ftfy = types.SimpleNamespace(fix_text=lambda text: text)
    folder = tmp_path_factory.mktemp("vace")
    torch.manual_seed(0)
    write_tokenizer(folder / "words")
    pipe = diffusers.WanVACEPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "words"),
        text_encoder=randomize(torch, transformers.UMT5EncoderModel(transformers.UMT5Config(**TEXT)), 0),
        vae=randomize(torch, diffusers.AutoencoderKLWan(**VAE), 1),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer=randomize(torch, diffusers.WanVACETransformer3DModel(**TRANSFORMER), 3),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "pipeline")
    return pipe, dit_video.load(folder / "pipeline", dtype="float32")


def draw_frames(seed, shape=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def sample_theirs(torch, pipe, noise, **options):
    """Return the latents `[t h w c]` of diffusers."""
    frames, height, width = SIZE
    result = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(noise).permute(3, 0, 1, 2)[None],
        output_type="latent",
        **options,
    )
    return result.frames[0].permute(1, 2, 3, 0).float().numpy()


def assert_equal(torch, pipelines, theirs, ours, *, references=0):
    """Compare the latents of the clip for arguments of both; return ours."""
    pipe, pipeline = pipelines
    noise = np.random.default_rng(0).standard_normal((3 + references, 6, 10, 4)).astype(np.float32)
    options = {"size": SIZE, "steps": STEPS, "guidance": GUIDANCE, "negative": NEGATIVE}
    result = generate_latents(pipeline, PROMPT, noise=noise, **options, **ours)
    expected = sample_theirs(torch, pipe, noise, **theirs)[references:]
    assert result.shape == (3, 6, 10, 4)
    assert np.abs(expected - noise[references:]).std() > 0.1
    np.testing.assert_allclose(result, expected, atol=1e-3)
    return result


def to_images(frames):
    from PIL import Image

    return [Image.fromarray(frame) for frame in frames]


def test_text_alone_equals_diffusers(torch, pipelines):
    assert_equal(torch, pipelines, {}, {})


def test_a_control_video_with_scales_of_the_layers_equals_diffusers(torch, pipelines):
    frames = draw_frames(1)
    theirs, ours = {"video": to_images(frames)}, {"control": dit_video.Clip(frames, 16)}
    full = assert_equal(torch, pipelines, theirs, ours)
    for theirs_scale, ours_scale in ((0.5, 0.5), ([0.2, 1.5], (0.2, 1.5))):
        scaled = assert_equal(
            torch,
            pipelines,
            theirs | {"conditioning_scale": theirs_scale},
            ours | {"strengths": {"control": ours_scale}},
        )
        assert np.abs(scaled - full).max() > 1e-2


@pytest.mark.parametrize("has_control", [False, True])
def test_inpainting_equals_diffusers(torch, pipelines, has_control):
    """In diffusers generated pixels are those of the video, too: grey ones, or a control."""
    frames, is_kept = draw_frames(1), np.random.default_rng(2).random(SIZE) < 0.5
    control = draw_frames(5) if has_control else np.full_like(frames, 127.5, dtype=np.float64)
    pixels = (np.where(is_kept[..., None], frames, control) / 255).astype(np.float32)
    masks = np.where(is_kept, 0, 1).astype(np.float32)[..., None]
    theirs = {
        name: torch.from_numpy(values).permute(0, 3, 1, 2)[None]
        for name, values in (("video", pixels), ("mask", masks))
    }
    ours = {"video": dit_video.Clip(frames, 16), "generated": ~is_kept}
    assert_equal(torch, pipelines, theirs, ours | ({"control": dit_video.Clip(control, 16)} if has_control else {}))


def test_first_and_last_images_with_control_equal_diffusers(torch, pipelines):
    """diffusers gets them as frames of the video, which are not masked."""
    frames, generated = draw_frames(1), np.full(SIZE, 255, np.uint8)
    generated[[0, -1]] = 0
    ours = {"image": frames[0], "last_image": frames[-1], "control": dit_video.Clip(draw_frames(1), 16)}
    assert_equal(torch, pipelines, {"video": to_images(frames), "mask": to_images(generated)}, ours)


def test_reference_images_equal_diffusers(torch, pipelines):
    """The second image is scaled by 2, is narrower than the clip then, and lies in the middle of a white one."""
    images = draw_frames(3, SIZE[1:]), draw_frames(4, (24, 24))
    theirs = {"reference_images": to_images(images), "video": to_images(draw_frames(1))}
    ours = {"reference_images": images, "control": dit_video.Clip(draw_frames(1), 16)}
    both = assert_equal(torch, pipelines, theirs, ours, references=2)
    assert (
        np.abs(
            both
            - assert_equal(
                torch,
                pipelines,
                theirs | {"reference_images": to_images(images[:1])},
                ours | {"reference_images": images[:1]},
                references=1,
            )
        ).max()
        > 1e-2
    )
