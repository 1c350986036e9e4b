"""Videos to videos of Wan give the latents of diffusers from the same folder, clip, noise, prompts and first step."""

import numpy as np
import pytest

import dit_video
from support.latents import generate_latents
from support.tiny_t5 import write_tokenizer
from support.torch_models import TEXT, randomize

pytestmark = pytest.mark.parity

PROMPT, NEGATIVE = "a  red ball &amp; a green cube moves left", "the table"
SIZE, STEPS = (9, 48, 80), 4
STRIDE, CHANNELS = (4, 8, 8), 4
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": 24,
    "ffn_dim": 40,
    "num_layers": 2,
    "freq_dim": 32,
}
VAE = {"base_dim": 8, "z_dim": CHANNELS, "latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [1.5, 1.0, 2.0, 1.0]}
SCHEDULERS = {
    "UniPCMultistepScheduler": {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "num_train_timesteps": 1000,
        "flow_shift": 3.0,
    },
    "FlowMatchEulerDiscreteScheduler": {"shift": 5.0},
}


@pytest.fixture(scope="module", params=SCHEDULERS)
def both(torch, tmp_path_factory, request):
    """Return diffusers' pipeline of videos to videos, and ours of the folder that its parts are saved to."""
    import diffusers
    import transformers

    folder = tmp_path_factory.mktemp("v2v")
    torch.manual_seed(0)
    write_tokenizer(folder / "words")
    parts = {
        "tokenizer": transformers.AutoTokenizer.from_pretrained(folder / "words"),
        "text_encoder": randomize(torch, transformers.UMT5EncoderModel(transformers.UMT5Config(**TEXT)), 0),
        "vae": randomize(torch, diffusers.AutoencoderKLWan(**VAE), 1),
        "scheduler": getattr(diffusers, request.param)(**SCHEDULERS[request.param]),
        "transformer": randomize(torch, diffusers.WanTransformer3DModel(**TRANSFORMER), 3),
    }
    diffusers.WanPipeline(**parts).save_pretrained(folder / "pipeline")
    pipe = diffusers.WanVideoToVideoPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe, dit_video.load(folder / "pipeline", dtype="float32")


@pytest.fixture(scope="module")
def clip():
    """Return frames of a red square that moves on noise."""
    frames = np.random.default_rng(5).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    for number, frame in enumerate(frames):
        frame[8:24, 4 * number : 4 * number + 24] = (220, 30, 40)
    return dit_video.Clip(frames, 16.0)


@pytest.fixture(scope="module")
def noise():
    grid = (1 + (SIZE[0] - 1) // STRIDE[0], SIZE[1] // STRIDE[1], SIZE[2] // STRIDE[2])
    return np.random.default_rng(0).standard_normal((*grid, CHANNELS)).astype(np.float32)


@pytest.mark.parametrize(("first_step", "guidance"), [(0, 5.0), (1, 5.0), (2, 1.0), (3, 5.0)])
def test_a_clip_noised_to_a_strength_equals_diffusers(torch, both, clip, noise, monkeypatch, first_step, guidance):
    """Diffusers takes a share of the steps, ours a time: one between that of the first step and the one before it."""
    from PIL import Image

    pipe, pipeline = both
    draws = []

    def draw(shape, **_):
        draws.append(shape)
        return torch.from_numpy(noise).permute(3, 0, 1, 2)[None].reshape(shape)

    monkeypatch.setattr("diffusers.pipelines.wan.pipeline_wan_video2video.randn_tensor", draw)
    _, height, width = SIZE
    result = pipe(
        video=[Image.fromarray(frame) for frame in clip.frames],
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        strength=(STEPS - first_step) / STEPS,
        output_type="latent",
    )
    expected = result.frames[0].permute(1, 2, 3, 0).float().numpy()
    assert draws == [(1, CHANNELS, *noise.shape[:3])]

    times = np.asarray(pipeline.make_sampling(steps=STEPS).make_times(pipeline.config.model.process).times)
    np.testing.assert_allclose(times[:-1], pipe.scheduler.sigmas[:-1], atol=1e-4)
    before = 1.0 if first_step == 0 else float(times[first_step - 1])
    strength = (before + float(times[first_step])) / 2
    options = {"size": SIZE, "steps": STEPS, "guidance": guidance, "negative": NEGATIVE, "noise": noise}

    def sample(prompt=PROMPT, strength=strength, video=clip):
        return generate_latents(pipeline, prompt, strength=strength, video=video, **options)

    np.testing.assert_allclose(sample(), expected, atol=1e-3)
    # That compares something. The first time hides the clip, the last ones almost hide the prompt.
    backwards = dit_video.Clip(clip.frames[::-1].copy(), clip.fps)
    changes = [{"prompt": "the table"}] if first_step == 0 else [{"strength": before}, {"video": backwards}]
    for change in changes:
        assert np.abs(sample(**change) - expected).max() > 1e-1
