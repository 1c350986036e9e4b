"""Pipelines of LTX-Video: loading, generating, saving, adapters and errors."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest

import dit_video
from dit_video.core.errors import MissingError, UserError
from dit_video.data.latents.codec import fit_chunk
from dit_video.diffusion import LinearQuadraticTimes, RectifiedFlow, UniformTimes
from dit_video.families.ltx.pipeline import KeyframesToVideo, read_parts
from dit_video.models.conditioning import FrameConditioning
from dit_video.sampling.request import Condition, Request
from dit_video.sampling.tasks import (
    Blend,
    DescribedEdit,
    Edit,
    Extend,
    Inpaint,
    Interpolate,
    Loop,
    Outpaint,
    Vary,
    ZoomOut,
)
from dit_video.tokens import Grid, PackedShape
from dit_video.video import Clip
from support.latents import generate_latents
from support.marks import mark_slow_except
from support.tiny_ltx import DIT, RESIDUAL_VAE, SIZE, VAE, write_ltx

PROMPT = "a red ball"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Read only."""
    folder = tmp_path_factory.mktemp("ltx") / "tiny"
    write_ltx(folder, shift=3.0, use_beta_sigmas=True)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Return a pipeline of version 0.9.5 or later."""
    folder = tmp_path_factory.mktemp("conditions") / "tiny"
    write_ltx(folder, kind="LTXConditionPipeline")
    return dit_video.load(folder, dtype="float32")


def draw_clip(frames, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, *SIZE[1:], 3), dtype=np.uint8)
    return Clip(pixels, fps=25.0)


def sample_latents(pipeline, **options):
    return generate_latents(pipeline, PROMPT, size=SIZE, **{"steps": 2, "guidance": 2.0} | options)


def test_the_pipeline_config_is_read_from_the_folder(folder):
    config = dit_video.load(folder, dtype="float32").config
    assert (config.model.backbone.replace(dtype="float32"), config.model.autoencoder) == (DIT, VAE)
    assert (config.model.text_encoder.folder, config.model.text_encoder.max_tokens) == (
        str(folder / "text_encoder"),
        128,
    )
    assert (config.model.process, config.sampling.time_schedule) == (
        RectifiedFlow(shift=3.0),
        UniformTimes(spacing="beta"),
    )
    assert (config.sampling.steps, config.sampling.guidance.get_scale("text")) == (50, 3.0)
    assert (config.size, config.fps, config.token_dt, config.model.token_lead) == ((161, 512, 704), 25.0, 8 / 25, 0)
    assert (config.conditioner, config.model.frame_conditioning) == (
        KeyframesToVideo(has_keyframes=False),
        FrameConditioning(),
    )


@pytest.mark.parametrize("options", [{"kind": "LTXConditionPipeline"}, {"vae": RESIDUAL_VAE}], ids=["class", "vae"])
def test_versions_from_095_on_are_known_by_their_class_or_their_autoencoder(tmp_path, options):
    write_ltx(tmp_path / "ltx", **options)
    parts = read_parts(tmp_path / "ltx")
    assert parts.denoiser.time_coordinate == "frame seconds"
    assert parts.text.max_tokens == 256
    assert parts.schedule.time_schedule == LinearQuadraticTimes()
    assert parts.conditioner == KeyframesToVideo(noise_scale=0.15)


@pytest.mark.slow
def test_a_clip_with_keyframes_is_generated_and_decoded_with_the_noise_of_its_seed(pipeline):
    """The first image is kept; the others are seen, but are tokens of their own."""
    image, last = draw_clip(1), draw_clip(1, seed=1)
    options = {"image": image, "conditions": [Condition(content=last, frame=-1, strength=0.9)]}
    latents = sample_latents(pipeline, **options)
    np.testing.assert_allclose(latents[:1], pipeline.encode(image), atol=1e-5)
    other = sample_latents(pipeline, image=image, last_image=draw_clip(1, seed=2))
    assert np.abs(latents - other)[1:].max() > 1e-4
    clip = pipeline.generate(PROMPT, size=SIZE, steps=2, guidance=2.0, **options)
    assert clip.frames.shape == (*SIZE, 3)
    np.testing.assert_array_equal(clip.frames, pipeline.decode(latents).frames)
    assert (pipeline.decode(latents, seed=1).frames != clip.frames).any()


@pytest.mark.slow
def test_clips_with_other_conditions_that_share_a_row_are_those_of_a_row_of_their_own(pipeline):
    requests = [
        Request(PROMPT, SIZE, image=draw_clip(1)),
        Request("a green cube", SIZE, seed=3, conditions=[Condition(content=draw_clip(9), frame=8, strength=0.7)]),
    ]
    model = replace(pipeline.config.model, layout=PackedShape(tokens=64, text=256, segments=4))
    config = replace(pipeline.config, model=model)
    packed = pipeline.replace(config=config)
    sampling = pipeline.make_sampling(steps=2, guidance=2.0)
    together, apart = (each.generate_many(requests, sampling=sampling) for each in (packed, pipeline))
    for left, right in zip(together, apart, strict=True):
        np.testing.assert_allclose(left.frames.astype(int), right.frames, atol=1)
    assert np.abs(apart[0].frames.astype(int) - apart[1].frames).max() > 10


@pytest.mark.nightly
def test_a_pipeline_saved_in_the_native_layout_is_the_same(pipeline, tmp_path):
    pipeline.save(tmp_path / "own")
    again = dit_video.load(tmp_path / "own")
    assert again.config == pipeline.config
    np.testing.assert_array_equal(sample_latents(again), sample_latents(pipeline))


@pytest.mark.parametrize(
    ("conditions", "rule"),
    [
        ([Condition(content=draw_clip(1), frame=17)], "frame=17 of a condition is invalid for a clip of 17"),
        (
            [Condition(content=draw_clip(9), frame=3)],
            "frame=3 .* invalid: a clip of 9 .* multiple of 8. Use 0 or 8, or method='auto'",
        ),
        ([Condition(content=draw_clip(9), frame=-10)], "frame=-10 .* multiple of 8. Use 0 or 8, or method='auto'"),
        ([Condition(content=draw_clip(4))], "4 frames is invalid: .* 1 \\+ 8k. Use its first 1, or method='auto'"),
    ],
)
def test_conditions_that_do_not_fit_the_clip_are_refused_or_kept_without_training(pipeline, conditions, rule):
    with pytest.raises(UserError, match=rule):
        sample_latents(pipeline, conditions=conditions, method="trained")
    if "method='auto'" in rule:
        with pytest.warns(UserWarning, match="it is kept without training"):
            plan = pipeline.config.conditioner(Request(PROMPT, SIZE, conditions=conditions), pipeline.model_parts)
        assert plan.method == "training_free"


@pytest.mark.parametrize("frame", [3, -2])
def test_an_image_may_be_at_any_frame(pipeline, frame):
    """Its tokens have the position of the frame, in seconds."""
    request = Request(PROMPT, SIZE, conditions=[Condition(content=draw_clip(1), frame=frame)])
    plan = pipeline.config.conditioner(request, pipeline.model_parts)
    np.testing.assert_allclose(plan.extra.positions[:, 0], frame % SIZE[0] / 25, atol=1e-6)
    assert len(plan.extra.noise) == 2


def test_pictures_with_latents_of_the_same_frames_are_refused(pipeline):
    """A clip that begins at frame 8 has latents of the sampled clip from its third on."""
    rule = r"frame={} of a condition is invalid: other conditions, or image=, have .* same frames. Use one of them"
    with pytest.raises(UserError, match=rule.format(0)):
        sample_latents(pipeline, image=draw_clip(1), conditions=[Condition(content=draw_clip(9), strength=0.5)])
    conditions = [Condition(content=draw_clip(25)), Condition(content=draw_clip(17), frame=8)]
    with pytest.raises(UserError, match=rule.format(8)):
        pipeline.generate(PROMPT, size=(25, *SIZE[1:]), conditions=conditions)


@pytest.mark.parametrize("name", ["last_image", "conditions"])
def test_versions_before_095_keep_other_images_than_the_first_without_training(folder, name):
    pipeline, image = dit_video.load(folder, dtype="float32"), draw_clip(1)
    pictures = {name: image if name == "last_image" else [Condition(content=image)]}
    with pytest.warns(UserWarning, match="was not trained for what is known of the clip: it is kept without training"):
        plan = pipeline.config.conditioner(Request(PROMPT, SIZE, **pictures), pipeline.model_parts)
    assert plan.method == "training_free"
    with pytest.raises(UserError, match="method='trained' is invalid: this model was not trained for what is known"):
        sample_latents(pipeline, method="trained", **pictures)
    assert pipeline.config.conditioner(Request(PROMPT, SIZE, image=image), pipeline.model_parts).extra is None


TASKS = {
    "extend by any number": lambda clip: Extend(clip, PROMPT, frames=5),
    "extend before": lambda clip: Extend(clip, PROMPT, frames=5, before=True),
    "blend": lambda clip: Blend(clip, draw_clip(15), PROMPT, frames=16),
    "interpolate": lambda clip: Interpolate(clip, PROMPT, factor=2),
    "zoom out": lambda clip: ZoomOut(clip[:1], PROMPT, frames=1),
    "described edit": lambda clip: DescribedEdit(clip, PROMPT, source="a dot"),
    "inpaint": lambda clip: Inpaint(clip, np.indices((32, 64))[1] > 31, PROMPT),
    "outpaint": lambda clip: Outpaint(clip, (32, 96), PROMPT),
    "edit": lambda clip: Edit(clip, PROMPT, strength=0.6),
    "vary": lambda clip: Vary(clip, PROMPT),
    "extend": lambda clip: Extend(clip, PROMPT, frames=8),
    "loop": lambda clip: Loop(PROMPT, size=(16, 32, 64)),
}


QUICK = ("inpaint", "outpaint", "edit", "vary", "extend", "loop")


@pytest.mark.parametrize("task", mark_slow_except(QUICK, TASKS))
def test_every_task_runs_without_training(pipeline, task):
    """LTX was trained with keyframes alone."""
    clip = draw_clip(17)
    made = TASKS[task](clip)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is kept without training
        result = pipeline.run(made, sampling=pipeline.make_sampling(steps=8, guidance=1.0))
    assert np.isfinite(np.asarray(result)).all()
    if task == "inpaint":
        request = made.make_request(pipeline.config)
        with pytest.warns(UserWarning, match="it is kept without training"):
            plan = pipeline.config.conditioner(request, pipeline.model_parts)
        assert (plan.method, plan.extra) == ("training_free", None)
        with pytest.raises(UserError, match="method='trained' is invalid"):
            pipeline.run(made, method="trained")


def test_too_little_memory_for_the_turns_of_a_loop_is_said_before_sampling(pipeline):
    loop, latents = Loop(PROMPT, size=(16, 32, 64)), pipeline.config.model.latent_grid(Grid(17, 32, 64))
    one_turn, _ = fit_chunk(VAE, "decode", 1, latents, memory=0)
    tight = pipeline.with_decoding(memory=one_turn)
    tight.generate(PROMPT, size=(17, 32, 64), steps=1)
    with pytest.raises(UserError, match=f"memory={one_turn} is invalid: to decode all latent frames"):
        tight.run(loop, callback=lambda step: pytest.fail("a step was taken"))


def test_an_edit_starts_from_the_latents_of_its_clip(pipeline):
    clip = draw_clip(17)
    plan = pipeline.config.conditioner(Request(PROMPT, SIZE, video=clip, strength=0.6), pipeline.model_parts)
    np.testing.assert_array_equal(plan.start, pipeline.encode(clip))
    assert (plan.start_time, plan.method, plan.transform) == (0.6, "", None)


def test_sizes_and_pictures_that_do_not_fit_are_refused(pipeline):
    with pytest.raises(UserError, match=r"T=16 is not 1 \+ 8k .*; use 9 or 17"):
        pipeline.generate(PROMPT, size=(16, 32, 64))
    with pytest.raises(UserError, match="width 48 is not divisible by 32"):
        pipeline.generate(PROMPT, size=(17, 32, 48))
    with pytest.raises(
        UserError, match=r"control of a request is invalid: .* It accepts image, last_image, conditions"
    ):
        sample_latents(pipeline, control=draw_clip(17))


def test_parts_that_do_not_fit_are_refused_before_weights_are_read(tmp_path):
    write_ltx(tmp_path / "ltx")
    for part in ("transformer", "vae"):
        (tmp_path / "ltx" / part / "diffusion_pytorch_model.safetensors").unlink()
    file = tmp_path / "ltx" / "vae" / "config.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"patch_size": 2}))
    with pytest.raises(UserError, match=r"trained with strides of \(8, 32, 32\), the vae has \(8, 16, 16\)"):
        dit_video.load(tmp_path / "ltx")
    file.write_text(json.dumps(document | {"spatial_compression_ratio": 16}))
    with pytest.raises(
        UserError, match=r"spatial_compression_ratio=16 is invalid: .* Use spatial_compression_ratio=32"
    ):
        dit_video.load(tmp_path / "ltx")
    file.write_text(json.dumps(document | {"encoder_causal": False}))
    with pytest.raises(UserError, match="encoder_causal=False is not supported"):
        dit_video.load(tmp_path / "ltx")
    (tmp_path / "ltx" / "tokenizer").rename(tmp_path / "tokenizer")
    with pytest.raises(MissingError, match="lacks the folders tokenizer"):
        dit_video.load(tmp_path / "ltx")


@pytest.mark.parametrize(
    ("kind", "scheduler", "rule"),
    [
        ("LTXConditionPipeline", {"shift": 3.0}, "shift=3.0 is invalid: .* linear-quadratic .* Use shift=1.0"),
        (
            "LTXConditionPipeline",
            {"use_dynamic_shifting": True, "shift_terminal": 0.1},
            "use_dynamic_shifting=True is invalid: .* Use use_dynamic_shifting=False",
        ),
        ("LTXConditionPipeline", {"shift_terminal": 0.1}, "shift_terminal=0.1 is invalid: .* Use shift_terminal=None"),
        ("LTXConditionPipeline", {"use_karras_sigmas": True}, "use_karras_sigmas=True .* Use use_karras_sigmas=False"),
        (
            "LTXPipeline",
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
            "_class_name=UniPCMultistepScheduler is invalid: .* FlowMatchEulerDiscreteScheduler. Use that class",
        ),
    ],
)
def test_schedulers_whose_times_are_not_those_of_the_version_are_refused(tmp_path, kind, scheduler, rule):
    write_ltx(tmp_path / "ltx", kind=kind, **scheduler)
    with pytest.raises(UserError, match=rule):
        read_parts(tmp_path / "ltx")


def test_a_pipeline_of_another_class_is_refused(tmp_path):
    write_ltx(tmp_path / "ltx", kind="FluxPipeline")
    with pytest.raises(UserError, match=r"_class_name=FluxPipeline is invalid: .* LTXConditionPipeline. Use another"):
        read_parts(tmp_path / "ltx")


def test_a_scheduler_with_unused_settings_of_a_shift_by_size_is_read(tmp_path):
    """Folders that were converted from another version keep them."""
    unused = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "use_dynamic_shifting": False}
    write_ltx(tmp_path / "ltx", kind="LTXConditionPipeline", **unused)
    assert read_parts(tmp_path / "ltx").schedule.time_schedule == LinearQuadraticTimes()
