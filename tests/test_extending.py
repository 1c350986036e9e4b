"""Extensions without an edit of the package: one file of another package, and one line that registers it."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import dit_video
from dit_video import families
from dit_video.core import config_json, registry
from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.data.clips import ClipSource
from dit_video.data.ingest.formats import detect, list_clips
from dit_video.data.latents.cache import LatentSource
from dit_video.data.tables import write_column
from dit_video.diffusion import GUIDANCE_METHODS, get_guidance_method
from dit_video.experiment import Experiment, LoraAdapters, Run
from dit_video.families.convert import convert
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.ltx import LtxDitConfig
from dit_video.models.backbones.mmdit import MMDiTConfig
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig, TemporalLayers
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.conditioning import TrainingKeys
from dit_video.nn import LoraConfig, get_graph_def
from dit_video.nn.attention import CausalFrames, Full, SpaceOnly
from dit_video.sampling import program
from dit_video.sampling.pipeline import Request
from dit_video.tokens import CanvasShape, Grid
from dit_video.training.hooks.logging import read_metrics
from dit_video.training.optim.schedules import Constant
from dit_video.video import decode
from support import packed_rows
from support.devices import wait_until
from support.extending import replace_backbone, shorten, train, train_by_script
from support.interruptions import interrupt
from support.jaxprs import count_primitive, find_branches
from support.latents import generate_latents
from support.marks import mark_slow_except
from support.packed_rows import FIRST, SECOND, TEXT_WIDTH, make_batch
from support.random_params import make_random_params

pytestmark = pytest.mark.slow
SOURCES = Path(__file__).parent / "support" / "extensions"


@pytest.mark.nightly
def test_a_sampler(add_package, tiny, tiny_run, tiny_pipeline, tmp_path):
    solver = add_package("their_sampler", "adams_sampler").Adams()
    arguments = {"size": (9, 16, 32), "seed": 1}
    result = generate_latents(tiny_pipeline, "a red circle", steps=16, solver=solver, **arguments)
    expected = generate_latents(tiny_pipeline, "a red circle", steps=64, solver="heun", **arguments)
    assert np.abs(result - expected).mean() < 1e-3 * np.abs(expected).mean()
    sampling = dataclasses.replace(tiny.EXPERIMENT.sampling, solver=solver, steps=2)
    pipeline = train(dataclasses.replace(tiny.EXPERIMENT, sampling=sampling), tiny_run, tmp_path / "run")
    assert pipeline.config.sampling.solver == solver
    assert np.isfinite(generate_latents(pipeline, "a red circle")).all()


@pytest.mark.nightly
def test_a_position_embedding(add_package, tiny, tiny_run, tmp_path):
    position = add_package("their_positions", "triangle_positions").Triangles()
    pipeline = train(tiny.EXPERIMENT.replace_backbone(absolute_position=position), tiny_run, tmp_path / "run")
    assert pipeline.config.model.backbone.absolute_position == position
    assert np.isfinite(generate_latents(pipeline, "a red circle", steps=2)).all()


@pytest.mark.nightly
def test_a_data_source(add_package, tiny, tiny_run, tiny_clips, tmp_path, monkeypatch):
    """All clips in one file are ingested like any other source, and train a model."""
    monkeypatch.setattr(detect, "_FORMATS", dict(detect._FORMATS))
    listed = list_clips(tiny_clips).clips
    clips = [(clip.name, clip.captions[0], clip.read()) for clip in listed]
    add_package("their_source", "packed_source").write_packed(tmp_path / "packed", clips)
    pipeline = train(tiny.EXPERIMENT, tiny_run, tmp_path / "run", tmp_path / "packed")
    infos = {info.name: info.captions for info in Run.open(tmp_path / "run").clips.infos}
    assert infos == {clip.name: clip.captions for clip in listed}
    assert np.isfinite(generate_latents(pipeline, "a red circle")).all()
    with pytest.raises(UserError, match=r"format='pile' is invalid: .* Use auto, .*packed"):
        list_clips(tmp_path / "packed", format="pile")


@pytest.mark.nightly
def test_a_unet_on_canvases_of_two_sizes(add_package, tiny, tiny_run, tmp_path):
    """It trains on one canvas, samples on another, and gives a clip the same result on both and alone."""
    theirs = add_package("their_unet", "canvas_mixer")
    base = tiny.EXPERIMENT.model.backbone
    backbone = theirs.SmallUnetConfig(channels=base.channels, context_width=base.context_width)
    room = {"text": 96, "segments": 4, "cell": theirs.HALF, "padding": backbone.canvas_padding}
    canvases = [CanvasShape(size=Grid(*size), **room) for size in ((3, 6, 8), (6, 4, 10))]
    experiment = tiny.EXPERIMENT.replace_model(backbone=backbone, layout=canvases[0])
    pipeline = train(experiment, tiny_run, tmp_path / "run")
    other = pipeline.replace(config=pipeline.config.replace_model(layout=canvases[1]))
    requests = [Request("a red circle", size, seed=seed) for seed, size in enumerate([(9, 16, 32), (1, 16, 16)])]
    sampling = pipeline.make_sampling(steps=2)
    results = [each.generate_many(requests, sampling=sampling) for each in (pipeline, other)]
    alone = [pipeline.generate(each.prompt, size=each.size, seed=each.seed, steps=2) for each in requests]
    for clips in zip(*results, alone, strict=True):
        assert all(np.abs(clip.frames.astype(int) - clips[0].frames).max() <= 1 for clip in clips)


def test_a_model_family(add_package, tiny, tiny_run, tmp_path, monkeypatch):
    """Its folders are written by a run, loaded, converted, and adapted by LoRA files with their names."""
    monkeypatch.setattr(families.registry, "_FAMILIES", list(families.registry._FAMILIES))
    theirs = add_package("their_family", "mixer_family")
    base = tiny.EXPERIMENT.model.backbone
    backbone = theirs.MixerConfig(channels=base.channels, context_width=base.context_width)
    experiment = tiny.EXPERIMENT.replace_model(backbone=backbone)
    pipeline = train(experiment, tiny_run, tmp_path / "run")
    result = generate_latents(pipeline, "a red circle", steps=2)

    shutil.copytree(tmp_path / "run" / "transformer", tmp_path / "theirs" / "transformer")
    pipeline.save(tmp_path / "theirs" / "rest")
    (tmp_path / "theirs" / "model_index.json").write_text(json.dumps({"_class_name": "TheirPipeline"}))
    loaded = dit_video.load(tmp_path / "theirs")
    np.testing.assert_array_equal(generate_latents(loaded, "a red circle", steps=2), result)
    for number, layout in enumerate(("dit_video", "diffusers")):
        source = tmp_path / ("theirs/transformer" if number == 0 else "0")
        convert(source, tmp_path / str(number), layout=layout)
    files = [path / "diffusion_pytorch_model.safetensors" for path in (tmp_path / "1", tmp_path / "theirs/transformer")]
    assert files[0].read_bytes() == files[1].read_bytes()

    lora = LoraConfig(rank=2, targets=("^backbone/.*kernel$",))
    tuned = experiment.replace_stage("denoiser", train=LoraAdapters(init_from=str(tmp_path / "run"), lora=lora))
    adapted = train(tuned, tiny_run, tmp_path / "tuned")
    file = tmp_path / "tuned" / "pytorch_lora_weights.safetensors"
    assert "transformer.proj_in.lora_A.weight" in load_file(file)
    merged = loaded.load_lora(file).denoiser_params["backbone"]["clip"]["kernel"]
    expected = adapted.denoiser_params["backbone"]["clip"]["kernel"]
    np.testing.assert_allclose(merged, expected, atol=1e-6)


def test_a_conditioning(add_package, tiny, tiny_run, tmp_path):
    """Poses of a camera are cached with latents, train a model and steer its samples."""
    camera = add_package("their_camera", "camera_poses").CameraPoses(dropout=0.5)
    pipeline = train(tiny.EXPERIMENT.replace_backbone(conditioning=(camera,)), tiny_run, tmp_path / "run")
    assert pipeline.config.model.backbone.conditioning == (camera,)
    source = LatentSource(tmp_path / "run" / "latents")
    poses = [source.read_field(index, camera.field) for index in range(len(source))]
    assert [len(path) for path in poses] == source.sizes[:, 0].tolist()
    assert len({float(path[-1, 0, 3]) for path in poses if len(path) > 1}) > 1

    def sample_latents(**options):
        return generate_latents(pipeline, "a red circle", size=(9, 16, 32), steps=2, **options)

    without, still, moving = sample_latents(), *(sample_latents(conditioning={"camera": speed}) for speed in (0, 2))
    assert np.abs(moving - still).max() > 0 < np.abs(still - without).max()
    scaled = [sample_latents(conditioning={"camera": 2}, strengths={"camera": strength}) for strength in (0, 0.5)]
    np.testing.assert_array_equal(scaled[0], without)
    assert np.abs(scaled[1] - moving).max() > 0 < np.abs(scaled[1] - without).max()
    requests = [dit_video.Request("a red circle", (9, 16, 32), conditioning={"camera": speed}) for speed in (0, 2)]
    together = pipeline.generate_many(requests, sampling=pipeline.make_sampling(steps=2))
    np.testing.assert_allclose(together[1].frames.astype(int), pipeline.decode(moving).frames.astype(int), atol=1)
    with pytest.raises(UserError, match="conditioning path is unknown to this model; use camera"):
        sample_latents(conditioning={"path": 1})
    with pytest.raises(UserError, match="give its speed, a number"):
        sample_latents(conditioning={"camera": [1]})


def test_a_conditioning_on_a_column_of_the_data_set(add_package, tiny, tiny_run, tmp_path, monkeypatch):
    """Motion vectors of a column are in the rows of cached latents and of clips that are encoded online.

    Guidance has a scale for them beside that of the prompt, for three evaluations of the model a step.
    """
    motion = add_package("their_motion", "motion_vectors").MotionVectors(dropout=0.5)
    folder = shutil.copytree((tiny_run / "data").resolve(), tmp_path / "data")
    infos = ClipSource(folder).infos
    experiment = replace_backbone(tiny.EXPERIMENT, conditioning=(motion,))
    with pytest.raises(UserError, match=r"has no column motion_vectors\. Use one of .*frames"):
        train(experiment, tiny_run, tmp_path / "refused", folder)
    assert not (tmp_path / "refused" / "denoiser").exists()
    vectors = {info.name: 3.0 * index + np.arange(2 * info.frames).reshape(-1, 2) for index, info in enumerate(infos)}
    columns = {"name": list(vectors), "motion_vectors": [values.ravel() for values in vectors.values()]}
    write_column(folder, "motion_vectors", columns)
    for is_cached in (True, False):
        data = dataclasses.replace(experiment.data, cache_latents=is_cached)
        path = tmp_path / f"run_{is_cached}"
        pipeline = train(dataclasses.replace(experiment, data=data), tiny_run, path, folder)
        run = Run.open(path)
        with contextlib.closing(run.stages[-1].open_inputs(run)[1](0)) as rows:
            planned, batch = rows.get_rows(0), next(rows)
        for segment, entry in enumerate(planned[0].entries, 1):
            name = rows.planner.table.names[entry.example].partition("@")[0]
            own = batch.segments[0] == segment
            frames = (4 * batch.positions[0, own, 0]).astype(int)
            np.testing.assert_array_equal(batch.fields["motion"][0, own], vectors[name][frames])
        options = {"size": (9, 16, 32), "steps": 2}
        still, moving = (
            generate_latents(pipeline, "a circle", conditioning={"motion": (x, 0)}, **options) for x in (0, 2)
        )
        assert np.abs(moving - still).max() > 0
    check_scale_of_motion(pipeline, monkeypatch)
    write_column(folder, "motion_vectors", columns | {"motion_vectors": [[0.0] * 99 for _ in infos]})
    run = Run.open(tmp_path / "run_True")
    with pytest.raises(UserError, match="clips are missing"):
        run.stages[-1].open_inputs(run)


def check_scale_of_motion(pipeline, monkeypatch):
    """Compare guidance of the prompt and of motion with its formula, for one step from noise to data.

    The weights are random, as two steps of training make little difference between conditions.
    """
    params = make_random_params(pipeline.config.model.backbone.make)
    pipeline = pipeline.replace(denoiser={"backbone": params})
    noise = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)
    evaluated, make_denoise = [], program.make_rows_denoise

    def make_counted(*arguments):
        denoise = make_denoise(*arguments)

        def count(noisy, time, state):
            jax.debug.callback(lambda: evaluated.append(1))
            return denoise(noisy, time, state)

        return count

    def get_latents(scales, prompt="a circle", *, steps=1, **motion):
        sampling = pipeline.make_sampling(guidance=scales, steps=steps, solver="euler")
        request = Request(prompt, (9, 16, 32), noise=noise, conditioning=motion)
        evaluated.clear()
        apart = dataclasses.replace(sampling, branch_evaluation="apart")
        (latents,) = pipeline.generate_latents([request], sampling=apart)
        jax.effects_barrier()
        together = pipeline.generate_latents([request], sampling=sampling)[0] if steps == 1 else latents
        np.testing.assert_allclose(together, latents, atol=1e-4)
        return latents

    both, moving, named, neither = (
        get_latents({}, prompt, **motion) for motion in ({"motion": (2, 0)}, {}) for prompt in ("a circle", "")
    )
    expected = {
        ("text", "motion"): neither + 3 * (moving - neither) + 5 * (both - moving),
        ("motion", "text"): neither + 5 * (named - neither) + 3 * (both - named),
    }
    scales = {"text": 5, "motion": 3}
    for order, latents in expected.items():
        result = get_latents({name: scales[name] for name in order}, motion=(2, 0))
        np.testing.assert_allclose(result, latents, atol=1e-4)
    assert np.abs(np.subtract(*expected.values())).max() > 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(program, "make_rows_denoise", make_counted)
        program.make_program.cache_clear()
        for own, count in ((scales, 3), ({"motion": 3}, 2), ({"text": 5, "motion": 1}, 2), ({"text": 1}, 1)):
            get_latents(own, steps=2, motion=(2, 0))
            assert len(evaluated) == 2 * count, own
    program.make_program.cache_clear()
    with pytest.raises(UserError, match=r"guidance of path is invalid: .* no such conditions, but text, motion\."):
        get_latents({"path": 2})


def test_an_optimizer_with_two_groups_of_rates(add_package, tiny, tiny_run, tmp_path, monkeypatch, script):
    """It is in the config: a run is killed and continued by train.py, and opened at a step, with this optimizer."""
    theirs = add_package("their_lion", "lion_optimizer")
    optimizer = theirs.Lion(learning_rate=1e-3, rate_factors={"^text/": 0.5}, schedule=Constant(warmup=0))
    experiment = shorten(tiny.EXPERIMENT.replace_stage("denoiser", optimizer=optimizer), tiny_run)
    experiment = dataclasses.replace(experiment.replace_stage("denoiser", steps=4), save_every=1)
    clips = (tiny_run / "data").resolve()
    Run.create(tmp_path / "run", experiment).train(clips)
    options = {"interrupted": "denoiser", "monkeypatch": monkeypatch, "script": script}
    train_by_script(experiment, clips, tmp_path / "parts", **options)
    weights = [tmp_path / run / "pipeline" / "denoiser.safetensors" for run in ("run", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    first, last = (dit_video.load(tmp_path / "parts", step=step, ema=0).denoiser_params for step in (3, 4))
    for part, rate in (("backbone", 1e-3), ("text", 0.5e-3)):
        change = jax.tree.map(lambda *pair: np.abs(np.subtract(*pair)).max(), first[part], last[part])
        assert max(jax.tree.leaves(change)) == pytest.approx(rate, rel=1e-3)


def test_a_map_of_labels_is_read_from_a_table(add_package, tiny, tiny_run, tmp_path):
    """Whole numbers on the latents' grid are trained, sampled and guided; they have no strength."""
    theirs = add_package("their_labels", "label_map")
    pipeline = train(replace_backbone(tiny.EXPERIMENT, conditioning=(theirs.LabelMap(),)), tiny_run, tmp_path / "run")
    arguments = {"size": (9, 16, 32), "steps": 2}
    labels = np.random.default_rng(0).integers(1, 4, (3, 2, 4))

    def get_latents(guidance=1.0, **options):
        return generate_latents(pipeline, "a red circle", guidance=guidance, **arguments, **options)

    results = [get_latents(conditioning={"labels": each}) for each in (labels, 4 - labels, 0 * labels)]
    assert np.abs(results[0] - results[1]).max() > 0 < np.abs(results[1] - results[2]).max()
    np.testing.assert_array_equal(get_latents(), results[2])
    guided = get_latents({"labels": 3}, conditioning={"labels": labels})
    assert np.abs(guided - results[0]).max() > 0
    with pytest.raises(UserError, match="labels holds integers, which have no strength"):
        get_latents(conditioning={"labels": labels}, strengths={"labels": 0.5})
    with pytest.raises(UserError, match=r"conditioning labels has the shape \[2, 4\], not \[3, 2, 4\]"):
        get_latents(conditioning={"labels": labels[0]})


def test_a_side_network_is_trained_beside_frozen_blocks(add_package, tiny, tiny_run, tmp_path):
    """It predicts as the model below it where it adds nothing, and learns; so does the head, which is zero at first."""
    theirs = add_package("their_ladder", "side_network")
    experiment = shorten(replace_backbone(tiny.EXPERIMENT, theirs.SideConfig, layers=2), tiny_run)
    optimizer = dataclasses.replace(experiment.denoiser.optimizer, trainable=("side_", "head/"))
    run = Run.create(tmp_path / "run", experiment.replace_stage("denoiser", optimizer=optimizer, steps=3))
    run.train((tiny_run / "data").resolve())
    params = dit_video.load(tmp_path / "run", ema=0).denoiser_params["backbone"]
    config, batch = run.model.backbone, make_batch((0, 1), (1, 0))
    small = dataclasses.replace(config, channels=2, context_width=TEXT_WIDTH, width=24)
    random = make_random_params(small.make)
    below = DiTConfig(**{field.name: getattr(small, field.name) for field in dataclasses.fields(DiTConfig)})

    def predict(config, params):
        model, conditioning = nnx.merge(get_graph_def(config.make), params), batch.get_conditioning(config)
        return model(batch.noisy, batch.get_time(config), batch.layout, conditioning)[0]

    without = {name: leaf for name, leaf in random.items() if not name.startswith("side_")}
    silent = random | {"side_up": jax.tree.map(jnp.zeros_like, random["side_up"])}
    np.testing.assert_allclose(predict(small, silent), predict(below, without), atol=1e-6)
    assert np.abs(predict(small, random) - predict(below, without)).max() > 1e-3
    assert np.abs(params["side_up"]["kernel"]).max() > 0


@pytest.mark.nightly
def test_rolling_diffusion(add_package, tiny, tiny_pipeline):
    """Frames that see no other ones are those that are sampled by themselves; others depend on the frames before."""
    theirs = add_package("their_rolling", "rolling_diffusion")
    fields = {"time": "token", "absolute_position": None}
    frames, parts = 5, 3
    noise = np.random.default_rng(0).normal(size=(8, 2, 4, 4)).astype(np.float32)
    for pattern, is_alone in ((SpaceOnly(), True), (Full(), False)):
        backbone = tiny_pipeline.config.model.backbone.replace(pattern=pattern, **fields)
        pipeline = tiny_pipeline.replace(
            config=tiny_pipeline.config.replace_model(backbone=backbone),
            denoiser={"backbone": make_random_params(backbone.make)},
        )
        result = theirs.roll(pipeline, "a red circle", Grid(9, 16, 32), noise, frames=frames, parts=parts)
        assert result.shape == (frames, 2, 4, 4)
        own = theirs.roll(pipeline, "a red circle", Grid(1, 16, 32), noise[3:], frames=1, parts=3 * parts)
        assert (np.abs(result[3] - own[0]).max() < 1e-4) == is_alone
        changed = noise * np.where(np.arange(8) == 2, -1, 1)[:, None, None, None]
        other = theirs.roll(pipeline, "a red circle", Grid(9, 16, 32), changed, frames=frames, parts=parts)
        is_other = np.abs(result - other).max(axis=(1, 2, 3)) > 1e-4
        assert is_other.tolist() == ([False, False, True, False, False] if is_alone else [True] * 5)


_SIZES = {"channels": 2, "context_width": TEXT_WIDTH, "width": 24, "layers": 4, "heads": 2, "attention": "dense"}
BACKBONES = {
    "dit": DiTConfig(**_SIZES),
    "mmdit": MMDiTConfig(**_SIZES, pattern=(Full(), CausalFrames())),
    "spatio-temporal": SpatioTemporalDiTConfig(**_SIZES, temporal=TemporalLayers(spatial_layers=2)),
    "wan": WanDitConfig(**_SIZES, mlp_dim=48, text_length=5, time_width=8),
    "ltx": LtxDitConfig(**_SIZES, patch=Grid(1, 2, 2), time="segment"),
}
KEYS = TrainingKeys(step=jax.random.key(0), rows=jax.random.split(jax.random.key(1), 2))
"""Keys of a step with two rows."""


def make_predictor(mixin, config):
    """Return a function of parameters and keys that predicts with the config's model, changed by a class."""
    base = type(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))
    changed = type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})
    graph = get_graph_def(lambda rngs: changed(config, rngs=rngs))
    batch = make_batch((0, 1), (1, 0))

    def predict(params, keys=None):
        conditioning = batch.get_conditioning(config)
        conditioning = conditioning if keys is None else conditioning.add(keys)
        return nnx.merge(graph, params)(batch.noisy, batch.get_time(config), batch.layout, conditioning)[0]

    return predict


def count_flops(predict, params, keys=None):
    """Count the operations of a prediction with its gradients, as XLA does."""
    step = jax.jit(jax.grad(lambda params: predict(params, keys).sum()))
    return step.lower(params).cost_analysis()["flops"]


@pytest.mark.parametrize("name", mark_slow_except(["mmdit"], BACKBONES))
def test_token_routing_on_any_backbone(add_package, monkeypatch, name):
    """A share of the tokens is passed around the blocks in the middle in training, which then costs less."""
    theirs, config = add_package("their_routing", "token_routing"), BACKBONES[name]
    params, predict = make_random_params(config.make), make_predictor(theirs.Routed, config)
    expected = jax.jit(predict)(params)
    np.testing.assert_array_equal(expected, packed_rows.predict(params, make_batch((0, 1), (1, 0)), config))
    routed, other = (jax.jit(predict)(params, keys) for keys in (KEYS, KEYS._replace(rows=KEYS.rows[::-1])))
    assert np.isfinite(routed).all()
    assert min(np.abs(routed - each)[0, FIRST].max() for each in (expected, other)) > 1e-3
    assert count_flops(predict, params, KEYS) < 0.9 * count_flops(predict, params)
    monkeypatch.setattr(theirs.Routed, "kept_share", 1.0)
    np.testing.assert_allclose(
        jax.jit(lambda params: predict(params, KEYS))(params)[:, :14], expected[:, :14], atol=1e-5
    )


@pytest.mark.parametrize("name", mark_slow_except(["dit"], BACKBONES))
def test_drop_path_on_any_backbone(add_package, monkeypatch, name):
    """Random blocks are skipped in training, and what is skipped is not computed."""
    theirs, config = add_package("their_depth", "drop_path"), BACKBONES[name]
    params, predict = make_random_params(config.make), make_predictor(theirs.DropPath, config)
    expected = jax.jit(predict)(params)
    results = [jax.jit(predict)(params, KEYS._replace(step=jax.random.key(seed))) for seed in range(4)]
    assert len({result.tobytes() for result in map(np.asarray, results)}) > 1
    program = jax.make_jaxpr(predict)(params, KEYS)
    skipped, computed = find_branches(program.jaxpr)
    assert count_primitive("dot_general", skipped) == 0 < count_primitive("dot_general", computed)
    monkeypatch.setattr(theirs.DropPath, "last_rate", 0.0)
    np.testing.assert_allclose(
        jax.jit(lambda params: predict(params, KEYS))(params)[:, :14], expected[:, :14], atol=1e-5
    )


@pytest.mark.parametrize("name", mark_slow_except(["mmdit"], BACKBONES))
def test_a_cache_of_features_on_any_backbone(add_package, name):
    """Its first prediction is the model's; the next one computes the first block alone, and adds what was kept."""
    theirs, config = add_package("their_cache", "feature_cache"), BACKBONES[name]
    cached = type("CachedConfig", (type(config),), {"every": 2})(**vars(config))
    batch, params = make_batch((0, 1), (1, 0)), make_random_params(config.make)
    base = type(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))
    changed = type(f"Cached{base.__name__}", (theirs.Cached, base), {})
    graph = get_graph_def(lambda rngs: changed(cached, rngs=rngs))

    @jax.jit
    def predict(params, noisy, state):
        conditioning = batch.get_conditioning(config)
        return nnx.merge(graph, params)(noisy, batch.get_time(config), batch.layout, conditioning, state)

    start = theirs.CachedFeatures(jnp.zeros((*batch.noisy.shape[:2], config.width)), jnp.full(2, 2))
    expected, _ = predict(params, batch.noisy, None)
    first, state = predict(params, batch.noisy, start)
    np.testing.assert_allclose(first, expected, atol=1e-6)
    again, state = predict(params, batch.noisy, state)
    np.testing.assert_allclose(again, expected, atol=1e-5)
    other = jnp.asarray(batch.noisy) + 0.1
    due, _ = predict(params, other, state)
    reused, _ = predict(params, other, state._replace(age=jnp.ones_like(state.age)))
    np.testing.assert_allclose(due, predict(params, other, None)[0], atol=1e-6)
    assert np.abs(reused - due)[0, FIRST].max() > 1e-4
    kept, computed = find_branches(jax.make_jaxpr(predict)(params, other, state).jaxpr)
    assert count_primitive("dot_general", kept) == 0 < count_primitive("dot_general", computed)


@pytest.mark.nightly
@pytest.mark.parametrize(("source", "name"), [("token_routing", "RoutedConfig"), ("drop_path", "DropPathConfig")])
def test_models_that_draw_in_training(add_package, tiny, tiny_run, tmp_path, source, name):
    """They are trained from the seed, and sampled as the model that they change."""
    theirs = add_package(f"their_{source}", source)
    experiment = replace_backbone(tiny.EXPERIMENT, getattr(theirs, name), layers=3)
    pipelines = [train(experiment, tiny_run, tmp_path / run) for run in ("first", "again")]
    trained = [flatten(each.denoiser_params) for each in pipelines]
    for path, leaf in trained[0].items():
        np.testing.assert_array_equal(trained[1][path], leaf, err_msg=path)
    plain = train(replace_backbone(tiny.EXPERIMENT, layers=3), tiny_run, tmp_path / "plain")
    assert np.abs(flatten(plain.denoiser_params)["backbone/head/kernel"] - trained[0]["backbone/head/kernel"]).max() > 0
    sampled = [pipelines[0], plain.replace(denoiser=pipelines[0].denoiser_params)]
    results = [generate_latents(each, "a red circle", seed=1, steps=2) for each in sampled]
    np.testing.assert_array_equal(*results)


@pytest.mark.nightly
def test_reference_frames_as_extra_tokens(add_package, tiny, tiny_run, tmp_path):
    """They join the tokens of their clip alone, and are not predicted."""
    reference = add_package("their_references", "reference_frames").ReferenceFrame()
    experiment = replace_backbone(tiny.EXPERIMENT, conditioning=(reference,))
    pipeline = train(experiment, tiny_run, tmp_path / "run")
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 32, 3)).astype(np.uint8)
    first, second = (
        generate_latents(pipeline, "a red circle", steps=2, conditioning={"reference": frame}) for frame in frames
    )
    assert first.shape == second.shape
    assert np.abs(first - second).max() > 0

    values = np.stack([reference.from_request(frame, None) for frame in frames])
    for changes in ({}, {"time": "token", "registers": 1, "pattern": CausalFrames()}):
        config = dataclasses.replace(pipeline.config.model.backbone, channels=2, context_width=6, **changes)
        model = nnx.merge(get_graph_def(config.make), make_random_params(config.make))

        @jax.jit
        def predict_rows(batch, record, model=model, config=config):
            conditioning = batch.get_conditioning(config).add(record)
            return model(batch.noisy, batch.get_time(config), batch.layout, conditioning)[0][0]

        def predict(clips, references, predict_rows=predict_rows):
            padded = np.full((3, *references.shape[1:]), 9, np.float32)
            padded[: len(references)] = references
            return predict_rows(make_batch(clips), reference.record(jnp.asarray(padded.reshape(1, -1, 3))))

        together, other = predict((0, 1), values), predict((0, 1), values[[0, 0]])
        np.testing.assert_allclose(together[FIRST], predict((0,), values[:1])[FIRST], atol=1e-5)
        np.testing.assert_allclose(together[SECOND], predict((1,), values[1:])[:6], atol=1e-5)
        np.testing.assert_allclose(together[FIRST], other[FIRST], atol=1e-6)
        assert (np.abs(together[SECOND] - other[SECOND]).max(axis=-1) > 1e-4).all()


def test_a_metric(add_package, load_file, tiny_run, tiny_clips, tmp_path, script):
    """It is computed, printed, written and reported as those of this package are."""
    add_package("their_metric", "their_metric")
    evaluation = load_file(SOURCES / "metric_config.py").EVALUATION
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for path in (run / "experiment.json", run / "pipeline.json", run / "pipeline" / "pipeline.json"):
        document = json.loads(path.read_text())
        document["experiment" if path.stem == "experiment" else "config"]["evaluation"] = config_json.to_json(
            evaluation
        )
        path.write_text(json.dumps(document))
    trained = script("experiments/train.py", SOURCES / "metric_config.py", "--data", tiny_clips, "--workdir", run)
    assert (trained.code, dit_video.load(run).config.evaluation) == (0, evaluation), trained.err
    ended = script("experiments/evaluate.py", run, "--out", tmp_path)
    assert ended.code == 0, ended.err

    written, again = (json.loads((folder / "metrics.json").read_text()) for folder in (run, tmp_path))
    assert again["results"] == written["results"]
    source, values = Run.open(run).clips, {}
    for entry in json.loads((run / "samples" / "prompts.json").read_text()):
        index = next(index for index, info in enumerate(source.infos) if info.caption == entry["prompt"])
        clips = decode(run / "samples" / entry["file"]), decode(source[index])
        motion, expected = (np.diff(clip.frames.astype(int), axis=0) for clip in clips)
        values[entry["file"]] = 2.0 * np.abs(motion - expected).mean()
    assert {file: entry["motion_error"] for file, entry in written["examples"].items()} == pytest.approx(values)
    mean, reach = np.mean(list(values.values())), 4.3027 * np.std(list(values.values()), ddof=1) / 3**0.5  # Student's t
    (result,) = (entry for entry in written["results"] if entry["name"] == "motion_error")
    assert (result["metric"], result["value"], result["count"]) == ("their_metric:MotionError", pytest.approx(mean), 3)
    assert result["interval"] == pytest.approx([mean - reach, mean + reach], rel=1e-4)

    assert f"motion error: {mean:.3f} levels ({mean - reach:.3f}" in ended.out
    assert f"motion error: {mean:.2f} levels (" in trained.out
    page = (run / "report.html").read_text(encoding="utf-8")
    row = page.split('<th scope="row">motion_error</th>')[1].split("</tr>")[0]
    for text in (f"{mean:.3f} levels", f"{mean + reach:.3f} levels", ">3<", ">lower<", "of 255, &lt;per pixel&gt;"):
        assert text in row
    assert page.count(" · motion error ") == len(values)
    assert f"{mean:.2f} levels" in page.split('id="samples"')[0]


def test_a_stage_without_a_denoiser(add_package, tiny, tiny_run, tmp_path, monkeypatch, script):
    """A joint embedding of clips and captions is trained, resumed bit for bit, and read by the stage after it."""
    theirs = add_package("their_stages", "contrastive_stage")
    contrastive = theirs.TrainContrastive(steps=2)
    stages = (contrastive, theirs.EmbedCaptions(contrastive=contrastive))
    data = dataclasses.replace(tiny.EXPERIMENT.data, held_out=())
    experiment = Experiment(name="contrastive", data=data, stages=stages, log_every=1, save_every=1)
    clips, files = (tiny_run / "data").resolve(), ("contrastive/weights.safetensors", "captions/embeddings.json")
    run = Run.create(tmp_path / "whole", experiment)
    run.prepare(clips)
    assert not any(stage.is_done(run) for stage in run.stages)
    run.run_stages()
    written = [(run.folder / file).stat().st_mtime_ns for file in files]
    entries = read_metrics(run.folder / "contrastive" / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2]
    assert all(0 <= entry["accuracy"] <= 1 for entry in entries)

    interrupted = Run.create(tmp_path / "parts", experiment)
    interrupted.prepare(clips)
    with monkeypatch.context() as patch:
        interrupt(patch, call=2, how="killed")
        with pytest.raises(KeyboardInterrupt):
            interrupted.run_stages()
    wait_until(lambda: interrupted.open_checkpoints("contrastive").latest() == 1)
    Run.open(tmp_path / "parts").run_stages()
    for file in files:
        assert (tmp_path / "parts" / file).read_bytes() == (run.folder / file).read_bytes()

    Run.open(run.folder).run_stages()  # nothing is done again
    assert [(run.folder / file).stat().st_mtime_ns for file in files] == written
    config = tmp_path / "config.py"
    document = config_json.to_json(experiment)
    config.write_text(f"from dit_video.core import config_json\nEXPERIMENT = config_json.from_json({document})")
    ended = script("experiments/train.py", config, "--data", clips, "--workdir", tmp_path / "script", "--no-cache")
    assert ended.code == 0, ended.err
    assert (tmp_path / "script" / files[1]).read_bytes() == (run.folder / files[1]).read_bytes()

    with pytest.raises(UserError, match=r"name='denoiser' is invalid: .* Use another name"):
        dataclasses.replace(experiment, stages=(dataclasses.replace(contrastive, name="denoiser"),))
    autoencoder, denoiser = tiny.EXPERIMENT.stages
    both = dataclasses.replace(tiny.EXPERIMENT, stages=(autoencoder, *stages, denoiser))
    assert Run(folder=tmp_path, experiment=both).trained_models == (
        "autoencoder",
        "denoiser",
        "contrastive",
        "captions",
    )


def test_a_training_loop(add_package, tiny, tiny_run, tmp_path):
    """It has the bits of the run's own training, also if it ends between two checkpoints and begins again."""
    theirs = add_package("their_loop", "training_loop")
    experiment = shorten(tiny.EXPERIMENT, tiny_run).replace_stage("denoiser", steps=4)
    runs = {name: Run.create(tmp_path / name, experiment) for name in ("own", "loop")}
    runs["own"].train((tiny_run / "data").resolve())
    expected = runs["own"].load_pipeline().denoiser_params
    runs["loop"].prepare((tiny_run / "data").resolve())
    theirs.train(runs["loop"], tmp_path / "checkpoints", until=3)
    ema = theirs.train(runs["loop"], tmp_path / "checkpoints", until=4)
    for path, values in flatten(runs["loop"].make_pipeline(ema).denoiser_params).items():
        np.testing.assert_array_equal(values, flatten(expected)[path], err_msg=path)


def test_a_config_names_registered_classes_only(add_package, tmp_path, monkeypatch):
    solver = add_package("their_sampler", "adams_sampler").Adams(share=0.4)
    written = config_json.to_json(solver)
    assert config_json.from_json(written) == solver
    monkeypatch.setattr(registry, "_CLASSES", {})
    with pytest.raises(UserError, match=r"'their_sampler:Adams' lies outside dit_video and is not registered"):
        config_json.from_json(written)
    with pytest.raises(TypeError, match=r"register it: dit_video\.core\.registry\.register"):
        config_json.to_json(solver)


def test_an_installed_package_registers_by_its_entry_point(add_package, install_package, monkeypatch):
    written = config_json.to_json(add_package("their_sampler", "adams_sampler").Adams())
    add_package("their_guidance", "tangential_guidance")
    monkeypatch.setattr(registry, "_CLASSES", {})
    monkeypatch.delitem(GUIDANCE_METHODS, "tangential")
    install_package("their_sampler")
    install_package("their_guidance")
    assert type(config_json.from_json(written)).__name__ == "Adams"
    assert type(get_guidance_method("tangential")).__name__ == "TangentialGuidance"
