"""Extensions of sampling without an edit of the package: a task, a conditioner, a decoder with noise, two steps."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dit_video
from dit_video.apps.studio.forms import make_tabs
from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.diffusion import Guidance, SkipLayerGuidance
from dit_video.experiment import Experiment, JoinPipelines, LoraAdapters, Run, TrainModel
from dit_video.experiment.initial_weights import check_initial_weights
from dit_video.models.autoencoders import Tiles, decode_stream
from dit_video.sampling import draw_initial_noise
from dit_video.sampling.clip_recipe import hash_pixels
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import PreviousStep
from dit_video.sampling.probe import DenoiserProbe
from dit_video.sampling.tasks import TASKS, Vary
from dit_video.tokens import Grid
from dit_video.training.hooks.logging import read_metrics
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from dit_video.video import decode, read_recipe
from support.compilations import count_compilations
from support.extending import replace_backbone, shorten, train, train_by_script
from support.latents import generate_latents
from support.tiny import EXPERIMENT
from support.tiny_lora import make_pipeline, write_lora
from support.tiny_pipeline import make_params

pytestmark = pytest.mark.slow


def test_a_task(add_package, install_package, tiny_pipeline, script, tmp_path, monkeypatch):
    """A dataclass and a line in TASKS: it is run beside others, and has options, a form, and entries of task files."""
    monkeypatch.setitem(TASKS, "shimmer", Vary)  # which ends with the test
    theirs = add_package("their_tasks", "shimmer_task")
    image = tiny_pipeline.generate("a blue square", size=(1, 16, 32), seed=5)
    task = theirs.Shimmer(image, "a red circle", seconds=0.5, is_reversed=True)
    result, _ = tiny_pipeline.run([task, Vary(image)], seed=[3, 4], steps=4)
    assert result.frames.shape == (5, 16, 32, 3)
    described = {"name": "shimmer", "image": hash_pixels(image.frames), "seconds": 0.5, "is_reversed": True}
    assert result.recipe["task"] == described
    image.save(tmp_path / "image.png")
    tiny_pipeline.save(tmp_path / "model")
    entry = {"task": "shimmer", "image": "image.png", "prompt": "a red circle", "seconds": 0.5, "is_reversed": True}
    (tmp_path / "tasks.json").write_text(json.dumps([entry | {"seed": 3}]))
    options = ("--image", tmp_path / "image.png", "--prompt", "a red circle", "--seconds", 0.5, "--is-reversed")
    runs = ((("shimmer", *options, "--seed", 3), "a.apng"), (("--prompts", tmp_path / "tasks.json"), "b"))
    for arguments, out in runs:
        TASKS.pop("shimmer")
        install_package("their_tasks")
        done = script("experiments/sample.py", tmp_path / "model", *arguments, "--steps", 4, "--out", tmp_path / out)
        assert done.code == 0, done.err
    np.testing.assert_allclose(decode(tmp_path / "a.apng").frames.astype(int), result.frames, atol=1)
    (entry,) = json.loads((tmp_path / "b" / "prompts.json").read_text())
    assert read_recipe(tmp_path / "b" / entry["file"])["task"] == described
    (tab,) = (tab for tab in make_tabs(tiny_pipeline.config) if tab.name == "shimmer")
    assert [field.kind for field in tab.fields] == ["image", "text", "number", "flag"]
    assert (tab.help, tab.fields[2].maximum) == ("An image that comes alive: it is the middle of the clip.", 10)


def test_a_method_of_guidance(add_package, tiny_pipeline, tmp_path):
    """It is in the config of a pipeline and in the recipe of a clip; other numbers of it compile nothing."""
    theirs = add_package("their_guidance", "tangential_guidance")
    size, noise = (9, 16, 32), np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)
    options = {"size": size, "noise": noise, "steps": 1, "negative": "a square", "solver": "euler"}

    def get_velocity(prompt="a red circle", **changes):
        return noise - generate_latents(tiny_pipeline, prompt, **options, **changes)  # of one step from noise to data

    c, u = get_velocity(guidance=1), get_velocity("a square", guidance=1)
    _, _, (first, _) = np.linalg.svd(np.stack([u.ravel(), c.ravel()]), full_matrices=False)
    kept = (u.ravel() @ first * first).reshape(u.shape)
    results, compiled = [], []
    for scale, damping in ((4.0, 1.0), (3.0, 0.5), (3.0, 0.0)):
        guidance = Guidance(scales={"text": scale}, method=theirs.TangentialGuidance(damping=damping))
        results.append(get_velocity(guidance=guidance))
        compiled.append(count_compilations())
        damped = u + damping * (kept - u)
        np.testing.assert_allclose(results[-1], damped + scale * (c - damped), atol=2e-5)
    assert compiled[0] == compiled[-1]
    assert np.abs(results[0] - (u + 4 * (c - u))).max() > 1e-3

    sampling = tiny_pipeline.make_sampling(guidance=guidance, steps=2)
    assert config_json.from_json(json.loads(json.dumps(config_json.to_json(sampling)))) == sampling
    clip = tiny_pipeline.generate("a red circle", size=size, steps=2, guidance=guidance)
    clip.save(tmp_path / "clip.mp4")
    assert config_json.from_json(read_recipe(tmp_path / "clip.mp4")["sampling"]) == sampling
    own = tiny_pipeline.replace(config=dataclasses.replace(tiny_pipeline.config, sampling=sampling))
    own.save(tmp_path / "model")
    again = dit_video.load(tmp_path / "model")
    assert again.config.sampling.guidance == guidance
    np.testing.assert_array_equal(again.generate("a red circle", size=size).frames, clip.frames)


def test_a_conditioner(add_package, tiny_pipeline):
    """It keeps a part of a clip, starts from it at a time, and is sampled beside other requests."""
    theirs = add_package("their_task", "inpainting_task")
    clip = tiny_pipeline.generate("a blue square", size=(9, 16, 32), seed=5)
    latents = tiny_pipeline.encode(clip)
    generated = np.ones(latents.shape[:3], bool)
    generated[:, :, :2] = False

    def sample_latents(start_time, steps=4, **options):
        conditioner = theirs.Inpainting(clip=clip, generated=generated, start_time=start_time)
        options = {"size": (9, 16, 32), "seed": 3, "conditioner": conditioner, **options}
        return generate_latents(tiny_pipeline, "a red circle", steps=steps, **options)

    full, half = sample_latents(1.0), sample_latents(0.5)
    for result in (full, half, sample_latents(0.5, solver="unipc"), sample_latents(0.5, solver="ddpm")):
        np.testing.assert_allclose(result[~generated], latents[~generated], atol=1e-5)
    distances = [np.abs(result - latents)[generated].mean() for result in (half, full)]
    assert 0 < distances[0] < distances[1]
    plain = dit_video.Request("a red circle", (9, 16, 32), seed=3)
    conditioners = [theirs.Inpainting(clip=clip, generated=generated, start_time=time) for time in (1.0, 0.5)]
    requests = [plain, *(dataclasses.replace(plain, conditioner=each) for each in conditioners)]
    many = tiny_pipeline.generate_latents(requests, sampling=tiny_pipeline.make_sampling(steps=4))
    alone = generate_latents(tiny_pipeline, "a red circle", size=(9, 16, 32), seed=3, steps=4)
    for result, expected in zip(many, (alone, full, half), strict=True):
        np.testing.assert_allclose(result, expected, atol=1e-5)
    with pytest.raises(UserError, match=r"generated has the shape \(2, 4\); use \(3, 2, 4\), of the latents"):
        sample_latents(1.0, conditioner=theirs.Inpainting(clip=clip, generated=generated[0]))
    with pytest.raises(UserError, match=r"start_time=0\.1 is invalid: .* Use at least 0\.25, or more steps"):
        sample_latents(0.1)
    with pytest.raises(UserError, match=r"start is invalid: its latents are .* Encode a clip of the size"):
        sample_latents(1.0, size=(5, 16, 32))


def test_a_decoder_with_time_and_noise(add_package, tiny, tiny_run, tmp_path, monkeypatch, script):
    """It trains by its own loss, also when it is continued, and its noise in sampling is that of the clip's seed."""
    theirs = add_package("their_decoder", "noisy_decoder")
    model = theirs.NoisyVaeConfig(**vars(tiny.EXPERIMENT.model.autoencoder), decode_time=0.3)
    experiment = tiny.EXPERIMENT.replace_model(autoencoder=model)
    for stage in ("autoencoder", "denoiser"):
        optimizer = AdamW(learning_rate=1e-3, schedule=Constant(warmup=0))
        experiment = experiment.replace_stage(stage, steps=2, optimizer=optimizer)
    clips = (tiny_run / "data").resolve()
    Run.create(tmp_path / "run", experiment).train(clips)
    assert all(0 < entry["decode_time"] < 0.6 and entry["latent_size"] > 0 for entry in read_log(tmp_path / "run"))
    options = {"interrupted": "autoencoder", "monkeypatch": monkeypatch, "script": script}
    train_by_script(dataclasses.replace(experiment, save_every=1), clips, tmp_path / "parts", **options)
    weights = [tmp_path / run / "autoencoder" / "weights.safetensors" for run in ("run", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    pipeline = dit_video.load(tmp_path / "run")
    requests = [dit_video.Request("a red circle", (9, 16, 32), seed=seed) for seed in (1, 2)]
    sampling = pipeline.make_sampling(steps=2)
    latents = pipeline.generate_latents(requests, sampling=sampling)
    clips = pipeline.generate_many(requests, sampling=sampling)
    for request, own, clip in zip(requests, latents, clips, strict=True):
        decoded = pipeline.decode(own, seed=request.seed).frames
        np.testing.assert_allclose(decoded.astype(int), clip.frames.astype(int), atol=1)
        assert np.abs(pipeline.decode(own, seed=9).frames.astype(int) - decoded).max() > 1
    tiles = Tiles(height=8, width=16, overlap=0)
    with pytest.raises(UserError, match=r"this decoder takes noise, .* Use tiles=None"):
        list(decode_stream(model, pipeline.codec.params, [latents[0][None]], tiles=tiles))


def read_log(run):
    return read_metrics(run / "autoencoder" / "metrics.jsonl")


def test_weights_of_8_bits(add_package, tmp_path):
    """They sample almost as the weights that they are made of, are saved and loaded, and have adapters beside them."""
    theirs = add_package("their_kernel", "int8_kernel")
    plain = make_pipeline()
    small = theirs.quantize(plain)

    def is_small(leaf):
        return isinstance(leaf, theirs.Int8Kernel)

    def restore(leaf):
        return leaf.values * leaf.scale if is_small(leaf) else leaf

    restored = jax.tree.map(restore, small.denoiser_params, is_leaf=is_small)
    restored = plain.replace(denoiser=restored)

    def sample_latents(pipeline):
        return generate_latents(pipeline, "a red circle", steps=2, guidance=1.0)

    result = sample_latents(small)
    np.testing.assert_allclose(result, sample_latents(restored), atol=1e-4)
    assert 0 < np.abs(result - sample_latents(plain)).max() < 0.05
    for name, pipeline in (("plain", plain), ("small", small)):
        pipeline.save(tmp_path / name)
    sizes = [(tmp_path / name / "denoiser.safetensors").stat().st_size for name in ("plain", "small")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = dit_video.load(tmp_path / "small")
    np.testing.assert_array_equal(sample_latents(loaded), result)

    file = write_lora(tmp_path / "style.safetensors", plain)
    styled = loaded.load_lora(file, 0.5)
    changed = sample_latents(styled)
    assert np.abs(changed - result).max() > 0.1
    np.testing.assert_allclose(changed, sample_latents(restored.load_lora(file, 0.5)), atol=1e-4)
    np.testing.assert_array_equal(sample_latents(styled.unload_lora()), result)
    for refused in (lambda: loaded.load_lora(file, merge=True), lambda: styled.save(tmp_path / "styled")):
        with pytest.raises(UserError, match=r"cannot be merged: backbone/blocks/.*kernel is a Int8Kernel"):
            refused()
    assert not (tmp_path / "styled").exists()
    training = LoraAdapters(init_from=str(tmp_path / "small"))
    with pytest.raises(UserError, match=r"init_from=.*small is invalid: .*kernel is a their_kernel:Int8Kernel"):
        check_initial_weights(dataclasses.replace(EXPERIMENT.denoiser, train=training), small.config.model)
    np.testing.assert_array_equal(sample_latents(loaded), result)


@pytest.mark.parametrize(
    ("solver", "guidance", "branch_evaluation", "counts"),
    [
        ("euler", 1.0, "together", (12, 6, 1)),
        ("heun", 3.0, "apart", (46, 24, 4)),
        ("euler", Guidance(scales={"text": 3.0}, interval=(0.4, 0.95)), "together", (12, 7, 2)),
    ],
    ids=["one branch", "two evaluations of two branches", "an interval of guidance"],
)
def test_a_cache_of_features(add_package, monkeypatch, solver, guidance, branch_evaluation, counts):
    """It samples as the model that it caches if that is computed in each step, and nearly so for half of the blocks."""
    theirs = add_package("their_cache", "feature_cache")
    computed, apply_blocks = [], theirs.CachedDiT.apply_blocks

    def count(self, x, inputs, *, layers):
        if layers.start:
            jax.debug.callback(lambda: computed.append(1))
        return apply_blocks(self, x, inputs, layers=layers)

    monkeypatch.setattr(theirs.CachedDiT, "apply_blocks", count)
    plain = dit_video.load("experiments/pretrained/shapes")
    requests = [dit_video.Request("a red circle moving left", (9, 48, 32), seed) for seed in range(8)]  # two rows
    sampling = plain.make_sampling(steps=12, guidance=guidance, solver=solver)
    sampling = dataclasses.replace(sampling, branch_evaluation=branch_evaluation)
    expected = plain.generate_latents(requests, sampling=sampling)
    distances = []
    for every, calls in zip((1, 2, 12), counts, strict=True):
        computed.clear()
        results = theirs.add_cache(plain, every).generate_latents(requests, sampling=sampling)
        jax.effects_barrier()
        assert len(computed) == calls
        distances.append(np.abs(np.stack(results) - np.stack(expected)).mean())
    assert distances[0] < 1e-5
    assert 0.005 < distances[1] < 0.5 * distances[2]


def test_self_conditioning(add_package, tiny, tiny_run, tmp_path):
    """A model that reads its last estimate is trained, and sampled with the estimates of each branch of guidance."""
    theirs = add_package("their_estimates", "self_conditioning")
    experiment = replace_backbone(tiny.EXPERIMENT, theirs.SelfConditionedConfig, layers=2)
    config = train(experiment, tiny_run, tmp_path / "run").config
    plain = dataclasses.replace(
        config, model=dataclasses.replace(config.model, backbone=experiment.get_model().backbone)
    )
    pipe = Pipeline(config, **make_params(plain))
    requests = [dit_video.Request("a red circle", size, seed=3) for size in ((9, 16, 32), (1, 16, 16), (9, 16, 32))]
    sampling = pipe.make_sampling(steps=4, guidance=2.0)
    results = pipe.generate_latents(requests, sampling=sampling)
    for result, request in zip(results, requests, strict=True):
        expected = sample_by_hand(pipe, request, sampling, keeps_estimate=True)
        np.testing.assert_allclose(result, expected, atol=1e-4)
        assert np.abs(result - sample_by_hand(pipe, request, sampling, keeps_estimate=False)).max() > 0.05
    skipped = SkipLayerGuidance(layers=(0,), stop=1.0)  # its weaker model has no estimates
    weaker = Guidance(scales={"text": 2.0}, skip_layers=skipped)
    (guided,) = pipe.generate_latents(requests[:1], sampling=pipe.make_sampling(steps=4, guidance=weaker))
    assert np.isfinite(guided).all()
    assert np.abs(guided - results[0]).max() > 0.05
    pipe.save(tmp_path / "pipeline")
    loaded = dit_video.load(tmp_path / "pipeline")
    for again, result in zip(loaded.generate_latents(requests, sampling=sampling), results, strict=True):
        np.testing.assert_array_equal(again, result)


def sample_by_hand(pipe, request, sampling, *, keeps_estimate):
    """Return the latents of Euler's steps for each branch of guidance with the last estimates of the data, or zeros."""
    probe, other = (DenoiserProbe(pipe, [text], request.size) for text in (request.prompt, ""))
    x = probe.patchify(jnp.asarray(draw_initial_noise(request.seed, probe.latent_grid, probe.channels))[None])
    first, second = jnp.zeros_like(x), jnp.zeros_like(x)
    times = np.asarray(sampling.make_times(probe.process).times)
    for time, following in itertools.pairwise(times):
        conditional, next_first = probe.denoise(x, time, first)
        unconditional, next_second = other.denoise(x, time, second)
        if keeps_estimate:
            first, second = next_first, next_second
        x = x + (following - time) * (unconditional + sampling.guidance.scales["text"] * (conditional - unconditional))
    return np.asarray(probe.unpatchify(x[0]))


def test_a_prior_whose_sample_conditions_the_next_step(add_package, tiny, tiny_run, tmp_path):
    theirs = add_package("their_prior", "color_prior")
    model = dataclasses.replace(
        tiny.EXPERIMENT.model,
        autoencoder=theirs.MeanColorConfig(),
        backbone=tiny.EXPERIMENT.model.backbone.replace(channels=3, patch=Grid(1, 1, 1)),
    )
    images = dataclasses.replace(tiny.EXPERIMENT.data, max_pixels=256, max_frames=1)
    prior = Experiment(name="prior", data=images, model=model, stages=(tiny.EXPERIMENT.denoiser,))
    decoder = replace_backbone(tiny.EXPERIMENT, conditioning=(theirs.ColorEmbedding(),))
    models = {"prior": prior, "decoder": decoder}
    stages = [TrainModel(name=name, experiment=shorten(each, tiny_run)) for name, each in models.items()]
    join = JoinPipelines(last="decoder", previous={"prior": PreviousStep(name="color", output="latents")})
    run = Run.create(tmp_path / "run", Experiment(name="unclip", data=tiny.EXPERIMENT.data, stages=(*stages, join)))
    run.train((tiny_run / "data").resolve())
    both = run.load_pipeline()
    prior, decoder = (dit_video.load(run.folder / name) for name in models)
    arguments = {"size": (9, 16, 32), "seed": 4, "steps": 2}
    color = generate_latents(prior, "a red circle", seed=4)
    assert color.shape == (1, 1, 1, 3)
    expected = generate_latents(decoder, "a red circle", conditioning={"color": color}, **arguments)
    np.testing.assert_array_equal(generate_latents(both, "a red circle", **arguments), expected)
    assert np.abs(generate_latents(decoder, "a red circle", **arguments) - expected).max() > 0
    both.save(tmp_path / "both")
    loaded = dit_video.load(tmp_path / "both")
    np.testing.assert_array_equal(generate_latents(loaded, "a red circle", **arguments), expected)
    arguments |= {"conditioning": {"color": (1, 0, 0)}}
    own = generate_latents(both, "a red circle", **arguments)
    np.testing.assert_array_equal(own, generate_latents(decoder, "a red circle", **arguments))
    with pytest.raises(UserError, match=r"name='size' of a step is invalid: .* Use color"):
        decoder.add_previous_step(PreviousStep(name="size"), prior)


def test_preferences_are_learned_from_clips_of_the_model_itself(add_package):
    """Three rounds of Diffusion-DPO make the shipped model prefer bright images, also for other seeds."""
    theirs = add_package("their_preferences", "preferences")
    pipe, prompts = (
        dit_video.load("experiments/pretrained/shapes"),
        [f"a {color} circle moving left" for color in ("red", "green", "blue")] * 3,
    )
    options = {"size": (1, 32, 32), "steps": 6, "guidance": 1.0}
    trained = theirs.train(pipe, prompts, lambda clip: np.asarray(clip).mean(), **options)
    seeds = list(range(1000, 1000 + len(prompts)))
    before, after = (
        np.mean(each.generate(prompts, seed=seeds, **options), axis=(1, 2, 3, 4)) for each in (pipe, trained)
    )
    assert (after > before).mean() > 0.7
    assert after.mean() > before.mean() + 1
