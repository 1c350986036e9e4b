import inspect
import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest

import dit_video
from dit_video.core import config_json, trees
from dit_video.core.errors import UserError
from dit_video.data.latents.codec import compute_autoencoder_identity
from dit_video.diffusion import (
    AdaptiveProjectedGuidance,
    Edm,
    Euler,
    Guidance,
    Heun,
    SkipLayerGuidance,
    UniPc,
    UniPcFlowSchedule,
)
from dit_video.models.autoencoders import CausalVaeConfig
from dit_video.sampling import sampler
from dit_video.sampling.pipeline import Request
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import Condition
from dit_video.tokens import Grid
from dit_video.weights import load as load_weights
from support.latents import generate_latents

PROMPT = "a red circle moving left"
SMALL = (5, 16, 16)
BLACK = np.zeros((5, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    """Return the tiny model with larger weights, so that prompts matter, which they hardly do after ten steps."""
    denoiser = trees.map_with_path(
        lambda path, leaf: leaf + 0.3 * np.random.default_rng(len(path)).standard_normal(leaf.shape).astype(leaf.dtype),
        tiny_pipeline.denoiser_params,
    )
    return tiny_pipeline.replace(denoiser=denoiser)


@pytest.fixture(scope="module")
def latents(pipeline):
    """Return the latents that `generate` makes of PROMPT at the size SMALL."""
    return generate_latents(pipeline, PROMPT, size=SMALL)


def test_a_clip_has_the_size_the_rate_and_the_caption(pipeline):
    clip = pipeline.generate(PROMPT, size=SMALL)
    assert isinstance(clip, dit_video.Clip)
    assert clip.frames.shape == (*SMALL, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.fps == 8.0
    assert clip.caption == PROMPT


def test_the_default_size_is_the_training_size(pipeline):
    assert pipeline.generate(PROMPT).frames.shape == (9, 16, 32, 3)


def test_the_interval_of_tokens_is_that_of_the_training(tiny):
    """A token stands for 4 pixel frames at 16 a second, and positions count seconds."""
    model = replace(tiny.EXPERIMENT.get_model(), layout=None, fps=16.0)
    counted = PipelineConfig(model=model, batch=1, sampling=tiny.EXPERIMENT.sampling, size=Grid(5, 16, 16))
    assert counted.token_dt == 1.0
    assert replace(counted, model=model.replace_backbone(time_coordinate="seconds")).token_dt == 0.25


def test_another_seed_gives_another_clip(pipeline, latents):
    np.testing.assert_array_equal(generate_latents(pipeline, PROMPT, size=SMALL, seed=0), latents)
    assert np.abs(generate_latents(pipeline, PROMPT, size=SMALL, seed=1) - latents).max() > 0.1


def test_the_prompt_and_the_negative_prompt_change_the_clip(pipeline, latents):
    for other in (
        generate_latents(pipeline, "a blue square", size=SMALL),
        generate_latents(pipeline, PROMPT, size=SMALL, negative="a blue square"),
        generate_latents(pipeline, PROMPT, size=SMALL, guidance=3.0),
    ):
        assert np.abs(other - latents).max() > 1e-3


def test_a_pipeline_has_a_negative_prompt_of_its_own(tiny_pipeline):
    other = "a blue square"

    def sample(pipeline, **options):
        return generate_latents(pipeline, PROMPT, size=SMALL, steps=2, guidance=3.0, **options)

    config = replace(tiny_pipeline.config, negative=other)
    own = tiny_pipeline.replace(config=config)
    named, plain = sample(tiny_pipeline, negative=other), sample(tiny_pipeline)
    assert np.abs(named - plain).max() > 1e-3
    np.testing.assert_array_equal(sample(own), named)
    np.testing.assert_array_equal(sample(own, negative=""), plain)


def test_guidance_of_one_evaluates_the_model_once(pipeline, monkeypatch):
    requested = []
    real = sampler.make_program

    def make_recording_program(*form):
        def run(params, state, batch, strength, *rest):
            requested.append(strength is not None)
            return real(*form)(params, state, batch, strength, *rest)

        return run

    monkeypatch.setattr(sampler, "make_program", make_recording_program)
    alone = generate_latents(pipeline, PROMPT, size=SMALL, guidance=1.0)
    other = generate_latents(pipeline, PROMPT, size=SMALL, guidance=1.0, negative="a blue square")
    assert requested == [False, False]
    np.testing.assert_array_equal(alone, other)
    near = generate_latents(pipeline, PROMPT, size=SMALL, guidance=1.0 + 1e-5)
    assert requested == [False, False, True]
    np.testing.assert_allclose(near, alone, atol=1e-3)


def test_noise_from_the_caller_is_the_starting_point(pipeline, latents):
    noise = sampler.draw_initial_noise(0, Grid(2, 2, 2), 4)
    again = generate_latents(pipeline, PROMPT, size=SMALL, seed=77, noise=noise)
    np.testing.assert_array_equal(again, latents)


def test_latents_have_the_stride_s_size_and_decode_to_the_clip(pipeline, latents):
    assert latents.shape == (2, 2, 2, 4)
    assert latents.dtype == np.float32
    decoded = pipeline.decode(latents, caption=PROMPT)
    clip = pipeline.generate(PROMPT, size=SMALL)
    np.testing.assert_array_equal(decoded.frames, clip.frames)
    assert (decoded.fps, decoded.caption) == (clip.fps, clip.caption)


@pytest.mark.nightly
def test_samplers_are_chosen_by_name(pipeline, latents):
    assert isinstance(pipeline.config.sampling.solver, Euler)
    np.testing.assert_array_equal(generate_latents(pipeline, PROMPT, size=SMALL, solver="euler"), latents)
    heun = generate_latents(pipeline, PROMPT, size=SMALL, solver="heun")
    assert np.abs(heun - latents).max() > 1e-3
    # With two steps, both of first order, UniPC is Euler: no step follows the correction.
    unipc = [generate_latents(pipeline, PROMPT, size=SMALL, solver="unipc", steps=n) for n in (2, 4)]
    np.testing.assert_allclose(unipc[0], latents, rtol=1e-4, atol=1e-3)
    assert np.abs(unipc[1] - latents).max() > 1e-2
    four = generate_latents(pipeline, PROMPT, size=SMALL, solver="euler", steps=4)
    assert np.abs(unipc[1] - four).max() > 1e-3
    chosen = pipeline.make_sampling(steps=7, guidance=3, solver="heun")
    assert (chosen.steps, chosen.guidance, chosen.solver) == (7, Guidance(scales={"text": 3.0}), Heun())
    kept = replace(chosen, solver=UniPc(order=3, uncorrected_steps=(0,)), time_schedule=UniPcFlowSchedule())
    assert config_json.from_json(config_json.to_json(kept)) == kept


def test_times_take_the_place_of_those_of_training(pipeline, latents):
    times = [float(time) for time in pipeline.trace(Request(PROMPT, Grid(*SMALL))).times]
    assert len(times) == 3
    same = generate_latents(pipeline, PROMPT, size=SMALL, times=times[:-1])
    np.testing.assert_allclose(same, latents, atol=1e-6)


MIXED = [
    Request(PROMPT, Grid(9, 16, 32), seed=1),
    Request("a blue square", Grid(1, 16, 16), seed=2),
    Request("a white triangle moving up", Grid(5, 16, 16), seed=3, negative="a blue square"),
    Request("", Grid(5, 32, 16), seed=4),
    Request("a green circle moving down", Grid(9, 32, 16), seed=5),
    Request("a red square", Grid(1, 16, 16), seed=6),
]


def test_many_clips_at_once_are_the_same_as_each_alone(pipeline):
    together = pipeline.generate_many(MIXED)
    for request, clip in zip(MIXED, together, strict=True):
        alone = pipeline.generate(request.prompt, size=request.size, seed=request.seed, negative=request.negative)
        assert clip.frames.shape == (*request.size, 3)
        assert clip.caption == request.prompt
        assert np.abs(clip.frames.astype(int) - alone.frames.astype(int)).max() <= 1


@pytest.mark.wrong_types
def test_a_list_of_prompts_gives_a_list_of_clips(pipeline):
    prompts, image = [PROMPT, "a blue square"], np.zeros((16, 16, 3), np.uint8)
    values = {"seed": [3, 4], "size": [SMALL, (1, 16, 16)], "negative": [None, "a cube"]}
    clips = pipeline.generate(prompts, **values)
    for number, clip in enumerate(clips):
        alone = pipeline.generate(prompts[number], **{name: value[number] for name, value in values.items()})
        assert np.abs(clip.frames.astype(int) - alone.frames).max() <= 1
        assert clip.recipe == alone.recipe
    shared = pipeline.generate(tuple(prompts), size=SMALL, seed=5, reference_images=[], conditions=[])
    assert [clip.recipe["seed"] for clip in shared] == [5, 5]
    assert pipeline.generate([]) == []
    with pytest.raises(UserError, match=r"seed of 3 values is invalid: .* has 2\. Use as many values, or one for all"):
        pipeline.generate(prompts, seed=[1, 2, 3])
    with pytest.raises(UserError, match=r"image is invalid: a list is no picture"):
        pipeline.generate(PROMPT, image=[image, image])


@pytest.mark.filterwarnings("ignore:this model was not trained")
def test_a_list_of_frames_is_the_video_of_a_prompt_and_a_list_of_prompts_has_one_for_each(pipeline):
    frames, options = list(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)), {"size": SMALL}
    options |= {"strength": 1.0, "generated": np.arange(5) > 0}
    alone = pipeline.generate(PROMPT, video=frames, **options)
    assert alone.recipe["pictures"] == pipeline.generate(PROMPT, video=np.stack(frames), **options).recipe["pictures"]
    for clip in pipeline.generate([PROMPT, PROMPT], video=[frames, frames], **options):
        assert clip.recipe == alone.recipe
    with pytest.raises(UserError, match=r"video of 5 values is invalid: .* has 2"):
        pipeline.generate([PROMPT, PROMPT], video=frames, **options)


@pytest.mark.wrong_types
@pytest.mark.parametrize("prompt", [5, None, b"a red circle", True, ["a", 5], np.array(["a"])])
def test_what_is_no_text_is_no_prompt(pipeline, prompt):
    with pytest.raises(TypeError, match=r"prompt=.* is invalid: it must be a text, or a list of them"):
        pipeline.generate(prompt, size=SMALL)


def test_the_signature_names_every_argument_with_its_type(pipeline):
    for method in (pipeline.generate, pipeline.run, pipeline.make_sampling):
        parameters = inspect.signature(method).parameters.values()
        assert all(each.kind is not each.VAR_KEYWORD and each.annotation is not each.empty for each in parameters)
    for name in ("step", "mask", "sampler", "output"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            pipeline.generate(PROMPT, **{name: 3})


def test_a_pipeline_is_shown_with_its_parts_sizes_and_dtypes(pipeline):
    counts = pipeline.count_parameters()
    lines = repr(pipeline).splitlines()
    assert lines[0] == "Pipeline: 9 frames of 32x16 pixels, 8 per second"
    for line, name in zip(lines[1:], ("autoencoder", "backbone", "text"), strict=True):
        assert re.fullmatch(rf"  {name}: \w+, {counts[name]:,} parameters, float32", line)


def test_no_requests_make_no_clips(pipeline):
    assert pipeline.generate_many([]) == []


def test_a_clip_larger_than_a_row_is_made_too(pipeline):
    assert pipeline.config.model.layout.tokens == 12
    assert pipeline.generate(PROMPT, size=(17, 32, 32)).frames.shape == (17, 32, 32, 3)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8, 16, 16), "T=8 is not 1 [+] 4k for temporal stride 4; use 5 or 9"),
        ((0, 16, 16), "T=0 is not"),
        ((5, 24, 16), r"height 24 is not divisible by 16 .*; use 16 or 32"),
        ((5, 16, 40), r"width 40 is not divisible by 16 .*; use 32 or 48"),
        ((5, 7, 16), "height 7 .*; use 16 or 32"),
        ((5, 0, 16), "height 0 "),
        ((5, -16, 16), "height -16 .*; use 16 or 32"),
        ((5, 16), "three whole numbers"),
        ((5.0, 16, 16), "three whole numbers"),
        (("5", "16", "16"), "three whole numbers"),
        ((True, 16, 16), "three whole numbers"),
    ],
)
def test_a_size_that_cannot_be_made_names_the_nearest(pipeline, size, message):
    with pytest.raises(UserError, match=message) as error:
        pipeline.generate(PROMPT, size=size)
    assert "\n" not in str(error.value)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps=0 is invalid: it must be at least 1"),
        ({"steps": -3}, "steps=-3 is invalid: it must be at least 1"),
        ({"solver": "plms"}, "unknown solver 'plms'; use one of ddim, ddpm"),
        (
            {"guidance": Guidance(skip_layers=SkipLayerGuidance(layers=(9,)))},
            r"skip_layers=\(9,\) is invalid: the model has",
        ),
        ({"seed": 1.5}, "seed=1.5 is invalid: it must be a whole number"),
        ({"seed": "3"}, "seed='3' is invalid: it must be a whole number"),
        ({"guidance": "3"}, "guidance scales={'text': '3'} are invalid: each must be a finite number"),
        ({"guidance": {"text": 3.0, "motion": 2.0}}, "guidance of motion is invalid: the model has .* but text. Use"),
        ({"steps": True}, "steps=True is invalid: it must be a whole number"),
        ({"video": [1]}, "video is invalid: a int is no picture"),
        ({"video": BLACK, "generated": np.zeros((16, 16), bool)}, "generated is invalid: no pixel .* Use True where"),
        ({"video": BLACK, "strength": "1"}, "strength='1' is invalid: it must be a number. Use strength=1"),
        ({"video": BLACK, "strength": True}, "strength=True is invalid: it must be a number"),
        ({"negative": 3}, "negative=3 is invalid: it must be a text"),
        ({"resample": "2"}, "resample='2' is invalid: it must be a whole number"),
        ({"conditions": [BLACK]}, r"conditions is invalid: .* Use \[Condition\(content=image"),
        ({"conditions": Condition(content=BLACK)}, r"conditions is invalid: .* Use \[Condition\(content=image"),
        ({"reference_images": BLACK[0]}, r"reference_images is invalid: .* Use \[image\]"),
        ({"strengths": [1]}, r"strengths=\[1\] is invalid: it must be a mapping of names"),
        ({"conditioning": 3}, "conditioning=3 is invalid: it must be a mapping of names"),
        ({"solver": 3}, "solver=3 is invalid: it must be the name of one, or a Solver"),
        ({"shift": "2"}, "shift='2' is invalid: it must be a number"),
        ({"times": "x"}, "times='x' is invalid: it must be a list of numbers"),
        ({"image": 3}, "image is invalid: a int is no picture"),
        ({"last_image": [BLACK]}, "last_image is invalid: a list is no picture"),
        ({"control": 3}, "control is invalid: a int is no picture"),
        ({"generated": 3, "video": BLACK}, r"generated of int64 \[\] is invalid: it must be boolean"),
        ({"method": None}, "method=None is invalid: it must be a text. Use 'auto', 'trained' or 'training_free'"),
        ({"method": "x"}, "method='x' is invalid. Use auto, trained or training_free"),
        ({"noise": "x"}, r"noise='x' is invalid: it must be an array \[t h w c\] of real numbers.* Use None"),
        ({"noise": np.zeros((2, 2, 2, 4), bool)}, r"noise of bool \[2, 2, 2, 4\] is invalid: it must be an array"),
        ({"conditioner": "x"}, "conditioner='x' is invalid: it must be a Conditioner. Use None for the model's own"),
        ({"previous": [1]}, r"previous=\[1\] is invalid: it must be a mapping of previous steps .* Use \{'prior'"),
        ({"previous": {"prior": 3}}, r"previous=\{'prior': 3\} is invalid: it must be a mapping"),
        ({"callback": "x"}, "callback='x' is invalid: it must be a function. Use print"),
        ({"sampling": {"steps": 2}}, r"sampling={'steps': 2} is invalid: it must be a Sampling. Use steps="),
        ({"seed": -1}, "is invalid: a seed is a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "is invalid: a seed is a whole number from 0 to 4294967295"),
        ({"guidance": -1.0}, "guidance scales={'text': -1.0} are invalid"),
        ({"guidance": (2.0, 3.0)}, r"guidance={'text': \(2\.0, 3\.0\)} is invalid: .* Use one number"),
        ({"noise": np.full((2, 2, 2, 4), np.nan, np.float32)}, "holds NaN or infinity; draw standard normal noise"),
        ({"noise": np.zeros((1, 2, 2, 4), np.float32)}, r"has shape \(2, 2, 2, 4\), not \(1, 2, 2, 4\)"),
    ],
)
def test_invalid_arguments_are_refused(pipeline, arguments, message):
    with pytest.raises(UserError, match=message):
        pipeline.generate(PROMPT, size=SMALL, **arguments)


def test_numbers_of_numpy_are_those_of_python(pipeline):
    options = {"video": BLACK, "strength": np.float32(0.5), "resample": np.int64(1)}
    clip = pipeline.generate(PROMPT, size=SMALL, steps=np.int64(4), seed=np.int64(3), **options)
    assert json.loads(json.dumps(clip.recipe)) == clip.recipe
    assert clip.recipe == pipeline.generate(PROMPT, size=SMALL, steps=4, seed=3, video=BLACK, strength=0.5).recipe


@pytest.mark.wrong_types
@pytest.mark.parametrize("requests", [["a red circle"], "a red circle", Request("a red circle"), None])
@pytest.mark.parametrize("name", ["generate_many", "generate_latents", "sample_many"])
def test_prompts_are_no_requests(pipeline, name, requests):
    with pytest.raises(UserError, match=r"requests are invalid: .* Use \[Request\("):
        getattr(pipeline, name)(requests)


@pytest.mark.wrong_types
def test_a_mapping_is_no_sampling_of_requests(pipeline):
    with pytest.raises(UserError, match=r"sampling=\{'steps': 2\} is invalid: it must be a Sampling"):
        pipeline.generate_many([Request(PROMPT, SMALL)], sampling={"steps": 2})


def test_guiding_a_model_trained_without_caption_dropout_warns(pipeline):
    always = pipeline.replace(config=replace(pipeline.config, caption_dropout=0.0))
    with pytest.warns(UserWarning, match="guidance drops text, and this model was trained without such dropout"):
        generate_latents(always, PROMPT, size=SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate_latents(always, PROMPT, size=SMALL, guidance=1.0)
        generate_latents(pipeline, PROMPT, size=SMALL)


def test_a_run_hands_its_caption_dropout_and_prediction_to_the_pipeline(tiny, pipeline):
    assert pipeline.config.caption_dropout == tiny.EXPERIMENT.denoiser.caption_dropout
    assert pipeline.config.model.prediction == tiny.EXPERIMENT.get_model().prediction


def test_a_config_without_a_prediction_predicts_velocity(pipeline):
    document = config_json.to_json(pipeline.config)
    del document["model"]["prediction"], document["caption_dropout"]
    assert config_json.from_json(document) == replace(pipeline.config, caption_dropout=None)
    with pytest.raises(UserError, match="the velocity of Edm"):
        replace(pipeline.config.model, process=Edm())


@pytest.mark.nightly
def test_guidance_accepts_all_its_options(pipeline, latents):
    plain = generate_latents(pipeline, PROMPT, size=SMALL, guidance=Guidance(scales={"text": 2.0}))
    np.testing.assert_array_equal(plain, latents)
    guidance = Guidance(scales={"text": 4.0}, rescale=0.7, interval=(0.1, 1.0), method=AdaptiveProjectedGuidance())
    other = generate_latents(pipeline, PROMPT, size=SMALL, guidance=guidance)
    assert np.abs(other - generate_latents(pipeline, PROMPT, size=SMALL, guidance=4.0)).max() > 1e-3
    kept = replace(pipeline.config.sampling, guidance=guidance)
    assert config_json.from_json(config_json.to_json(kept)) == kept


# Pixels to latents and back.


def test_encode_gives_latents_and_reconstruct_keeps_size_rate_and_caption(pipeline):
    from dit_video.scenes import shapes

    clip = replace(shapes.render_example(3, seed=9, sizes=(Grid(*SMALL),)), fps=5)
    assert pipeline.encode(clip).shape == (2, 2, 2, 4)
    again = pipeline.reconstruct(clip)
    assert again.frames.shape == clip.frames.shape
    assert (again.fps, again.caption) == (5.0, clip.caption)
    np.testing.assert_array_equal(again.frames, pipeline.decode(pipeline.encode(clip)).frames)
    # The linear start alone knows the background.
    assert np.abs(again.frames.astype(float) - clip.frames).mean() < 25


def test_a_clip_that_does_not_fit_the_stride_is_not_encoded(pipeline):
    with pytest.raises(UserError, match=r"T=4 is not 1 [+] 4k"):
        pipeline.encode(dit_video.Clip(np.zeros((4, 16, 16, 3), np.uint8), 8))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda latents: np.where(np.arange(4) == 2, np.nan, latents), "hold NaN or infinity"),
        (lambda latents: latents[..., :3], r"shape \[2, 2, 2, 3\] are invalid: .* \[t h w 4\]"),
    ],
)
def test_latents_that_are_no_latents_are_not_decoded(pipeline, spoil, message):
    with pytest.raises(UserError, match=message):
        pipeline.decode(spoil(np.zeros((2, 2, 2, 4), np.float32)).astype(np.float32))


# Files.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda each: [], r"they are of 0 clips, .* of which these are 2\. Use pipe\.encode"),
        (lambda each: [each], r"they are of 1 clips, .* of which these are 2\. Use pipe\.encode"),
        (lambda each: [each, each[:1]], r"latents\[1\] .* of shape \[2, 2, 2, 4\] without NaN .*Use pipe\.encode"),
        pytest.param(
            lambda each: [each, dit_video.Clip(np.zeros((*SMALL, 3), np.uint8), 8.0)],
            r"latents\[1\] \(Clip of shape ",
            marks=pytest.mark.wrong_types,
        ),
        (lambda each: [np.full_like(each, np.nan), each], r"latents\[0\] .* without NaN and infinity"),
    ],
)
def test_latents_that_are_not_those_of_the_requests_do_not_open_the_denoiser(pipeline, latents, change, message):
    with pytest.raises(UserError, match=message):
        pipeline.open_denoiser([Request(PROMPT, Grid(*SMALL))] * 2, change(latents))
    with pytest.raises(UserError, match="one or more requests"):
        pipeline.open_denoiser([], [])


def test_float32_files_come_back_bit_for_bit(pipeline, latents, tmp_path):
    pipeline.save(tmp_path / "saved")
    loaded = dit_video.load(tmp_path / "saved")
    assert loaded.config == pipeline.config
    for mine, theirs in (
        (pipeline.denoiser_params, loaded.denoiser_params),
        (pipeline.codec.params, loaded.codec.params),
    ):
        mine, theirs = trees.flatten(mine), trees.flatten(theirs)
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[path], theirs[path]) for path in mine)
    np.testing.assert_array_equal(generate_latents(loaded, PROMPT, size=SMALL), latents)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "autoencoder.safetensors",
        "denoiser.safetensors",
        "pipeline.json",
        "preview.safetensors",
    ]


def test_bfloat16_files_take_half_and_come_back_close(pipeline, latents, tmp_path):
    pipeline.save(tmp_path / "whole")
    pipeline.save(tmp_path / "half", dtype="bfloat16")
    bytes_of = {
        name: sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")) for name in ("whole", "half")
    }
    assert 0.4 < bytes_of["half"] / bytes_of["whole"] < 0.65  # names take space too
    loaded = dit_video.load(tmp_path / "half")
    mine, theirs = trees.flatten(pipeline.denoiser_params), trees.flatten(loaded.denoiser_params)
    for path in mine:
        np.testing.assert_allclose(theirs[path], mine[path], rtol=2**-8)
    assert (
        load_weights(tmp_path / "half" / "denoiser.safetensors", dtype=None)["backbone"]["head"]["bias"].dtype
        == "bfloat16"
    )
    difference = generate_latents(loaded, PROMPT, size=SMALL) - latents
    assert np.sqrt(np.square(difference).mean()) < 0.1 * latents.std()


def test_saving_replaces_a_pipeline_and_nothing_else(tiny_pipeline, tmp_path):
    tiny_pipeline.save(tmp_path / "saved")
    tiny_pipeline.save(tmp_path / "saved", dtype="bfloat16")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no pipeline"):
        tiny_pipeline.save(tmp_path / "home")
    with pytest.raises(UserError, match=r"dtype=int8 is invalid: .* float32 or bfloat16"):
        tiny_pipeline.save(tmp_path / "other", dtype="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "saved"]
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_parameters_are_counted_by_part(tiny_pipeline):
    counts = tiny_pipeline.count_parameters()
    assert counts.keys() == {"autoencoder", "backbone", "text"}
    assert counts["backbone"] == sum(
        leaf.size for leaf in trees.flatten(tiny_pipeline.denoiser_params["backbone"]).values()
    )


def test_the_identity_of_an_autoencoder_is_its_config_and_weights(tiny_pipeline):
    config, params = tiny_pipeline.config.model.autoencoder, tiny_pipeline.codec.params
    mark = compute_autoencoder_identity(config, params)
    assert compute_autoencoder_identity(config, {**params}) == mark
    assert compute_autoencoder_identity(replace(config, width=16), params) != mark
    other = {"normalizer": {"mean": np.ones(4, np.float32), "std": np.ones(4, np.float32)}}
    assert compute_autoencoder_identity(config, params | other) != mark


def test_the_identity_of_an_autoencoder_ignores_its_form_and_remat_but_not_its_dtype():
    config, params = CausalVaeConfig.wan21(), {"kernel": np.ones(3, np.float32)}
    mark = compute_autoencoder_identity(config, params)
    assert compute_autoencoder_identity(replace(config, form="native", remat=True), params) == mark
    assert compute_autoencoder_identity(replace(config, bfloat16=True), params) != mark


# In a notebook.


def test_a_clip_displays_itself(pipeline):
    assert "<video" in pipeline.generate(PROMPT, size=SMALL)._repr_html_()
    image = pipeline.generate("a red circle", size=(1, 16, 16))._repr_html_()
    assert "<img" in image
    assert "a red circle" in image
