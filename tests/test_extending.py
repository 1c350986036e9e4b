"""Extensions without an edit of the package: one file of another package, and one line that registers it."""

import dataclasses
import json
import shutil
import sys
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
from dit_video.core.errors import MissingError, UserError
from dit_video.data.ingest.formats import detect, list_clips
from dit_video.data.latents.cache import LatentSource
from dit_video.experiment import LoraAdapters, StagedExperiment
from dit_video.experiment.run import Run, StagedRun
from dit_video.families.convert import convert
from dit_video.nn import LoraConfig, get_graph_def
from dit_video.nn.attention import CausalFrames
from dit_video.sampling.pipeline import Pipeline, Request
from dit_video.tokens import CanvasShape, Grid
from dit_video.training.hooks.logging import read_metrics
from dit_video.video import decode
from support.devices import wait_until
from support.extending import replace_backbone, train
from support.interruptions import interrupt
from support.latents import generate_latents
from support.packed_rows import FIRST, SECOND, make_batch
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
    backbone = dataclasses.replace(tiny.EXPERIMENT.denoiser.backbone, absolute_position=position)
    denoiser = dataclasses.replace(tiny.EXPERIMENT.denoiser, backbone=backbone)
    pipeline = train(dataclasses.replace(tiny.EXPERIMENT, denoiser=denoiser), tiny_run, tmp_path / "run")
    assert pipeline.config.backbone.absolute_position == position
    assert np.isfinite(generate_latents(pipeline, "a red circle", steps=2)).all()


@pytest.mark.nightly
def test_a_data_source(add_package, tiny, tiny_run, tiny_clips, tmp_path, monkeypatch):
    """All clips in one file are ingested like any other source, and train a model."""
    monkeypatch.setattr(detect, "_FORMATS", dict(detect._FORMATS))
    listed = list_clips(tiny_clips).clips
    clips = [(clip.name, clip.captions[0], clip.read()) for clip in listed]
    add_package("their_source", "packed_source").write_packed(tmp_path / "packed", clips)
    pipeline = train(tiny.EXPERIMENT, tiny_run, tmp_path / "run", tmp_path / "packed")
    infos = {info.name: info.captions for info in Run.open(tmp_path / "run").runtime.clips.infos}
    assert infos == {clip.name: clip.captions for clip in listed}
    assert np.isfinite(generate_latents(pipeline, "a red circle")).all()
    with pytest.raises(UserError, match=r"format='pile' is invalid: .* Use auto, .*packed"):
        list_clips(tmp_path / "packed", format="pile")


@pytest.mark.nightly
def test_a_unet_on_canvases_of_two_sizes(add_package, tiny, tiny_run, tmp_path):
    """It trains on one canvas, samples on another, and gives a clip the same result on both and alone."""
    theirs = add_package("their_unet", "canvas_mixer")
    base = tiny.EXPERIMENT.denoiser
    backbone = theirs.SmallUnetConfig(channels=base.backbone.channels, context_width=base.backbone.context_width)
    room = {"text": 96, "segments": 4, "cell": theirs.HALF, "padding": backbone.canvas_padding}
    canvases = [CanvasShape(size=Grid(*size), **room) for size in ((3, 6, 8), (6, 4, 10))]
    denoiser = dataclasses.replace(base, backbone=backbone, layout=canvases[0])
    pipeline = train(dataclasses.replace(tiny.EXPERIMENT, denoiser=denoiser), tiny_run, tmp_path / "run")
    other = Pipeline(
        dataclasses.replace(pipeline.config, layout=canvases[1]),
        autoencoder=pipeline.codec.params,
        denoiser=pipeline.denoiser_params,
    )
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
    base = tiny.EXPERIMENT.denoiser
    backbone = theirs.MixerConfig(channels=base.backbone.channels, context_width=base.backbone.context_width)
    experiment = dataclasses.replace(tiny.EXPERIMENT, denoiser=dataclasses.replace(base, backbone=backbone))
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
    tuned = dataclasses.replace(experiment.denoiser, train=LoraAdapters(init_from=str(tmp_path / "run"), lora=lora))
    adapted = train(dataclasses.replace(experiment, denoiser=tuned), tiny_run, tmp_path / "tuned")
    file = tmp_path / "tuned" / "pytorch_lora_weights.safetensors"
    assert "transformer.proj_in.lora_A.weight" in load_file(file)
    merged = loaded.load_lora(file).denoiser_params["backbone"]["clip"]["kernel"]
    expected = adapted.denoiser_params["backbone"]["clip"]["kernel"]
    np.testing.assert_allclose(merged, expected, atol=1e-6)


def test_a_conditioning(add_package, tiny, tiny_run, tmp_path):
    """Poses of a camera are cached with latents, train a model and steer its samples."""
    camera = add_package("their_camera", "camera_poses").CameraPoses(dropout=0.5)
    base = tiny.EXPERIMENT.denoiser
    denoiser = dataclasses.replace(base, backbone=dataclasses.replace(base.backbone, conditioning=(camera,)))
    pipeline = train(dataclasses.replace(tiny.EXPERIMENT, denoiser=denoiser), tiny_run, tmp_path / "run")
    assert pipeline.config.backbone.conditioning == (camera,)
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


@pytest.mark.nightly
def test_a_control_stack(add_package, tiny, tiny_run, tmp_path):
    """It predicts as the model that it controls, until it is trained and wherever its strength is 0."""
    theirs = add_package("their_control", "control_stack")
    fields = {"layers": 3, "after": (0, 2), "registers": 1, "conditioning": (theirs.Brightness(),)}
    experiment = replace_backbone(tiny.EXPERIMENT, theirs.ControlledConfig, **fields)
    pipeline = train(experiment, tiny_run, tmp_path / "run")
    config, trained = pipeline.config, pipeline.denoiser_params
    assert config.backbone.after == (0, 2)

    def sample_latents(backbone, params, strength=None, **values):
        parts = {"autoencoder": pipeline.codec.params, "denoiser": trained | {"backbone": params}}
        model = Pipeline(dataclasses.replace(config, backbone=backbone), **parts)
        strengths = {} if strength is None else {"brightness": strength}
        arguments = {"size": (9, 16, 32), "steps": 2}
        arguments |= {"conditioning": values, "strengths": strengths}
        return generate_latents(model, "a red circle", **arguments)

    params, hint = trained["backbone"], np.linspace(0, 1, 24).reshape(3, 2, 4)
    expected = sample_latents(config.backbone.base, params["base"])
    without, half, full = (
        sample_latents(config.backbone, params, strength, brightness=hint) for strength in (0, 0.5, 1)
    )
    np.testing.assert_array_equal(without, expected)
    assert np.abs(half - without).max() > 0 < np.abs(full - half).max()
    base = make_random_params(config.backbone.base.make)
    new = params | {"base": base, "outputs": {name: 0 * leaf for name, leaf in params["outputs"].items()}}
    result = sample_latents(config.backbone, new, brightness=hint)
    np.testing.assert_array_equal(result, sample_latents(config.backbone.base, base))


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
        config = dataclasses.replace(pipeline.config.backbone, channels=2, context_width=6, **changes)
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


@pytest.mark.nightly
def test_actions_with_a_kv_cache(add_package, tiny, tiny_run, tmp_path):
    """Frames that are sampled one by one, with keys and values of earlier ones cached, equal those without a cache."""
    theirs = add_package("their_actions", "frame_actions")
    fields = {"pattern": CausalFrames(), "absolute_position": None, "conditioning": (theirs.FrameActions(),)}
    training = {"time_per": "frame"}
    experiment = replace_backbone(tiny.EXPERIMENT, time="token", layers=2, training=training, **fields)
    pipeline = train(experiment, tiny_run, tmp_path / "run")
    actions = np.asarray([[0.2, 0.1], [0.5, -0.3], [0.1, 0.4]])
    trained = jax.device_put(pipeline.denoiser_params["backbone"])
    world = theirs.World(pipeline, "a red circle", tiny.SIZES[2])
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(1, world.grid.volume, 16)), jnp.float32)
    random = make_random_params(pipeline.config.backbone.make)
    for params in (trained, random):
        cached, uncached = (world.sample_clip(params, noise, actions, cached=cached) for cached in (True, False))
        np.testing.assert_allclose(cached, uncached, atol=1e-5)
    changed = world.sample_clip(random, noise, actions * [[1], [0], [1]], cached=True)
    difference = np.abs(changed - cached).max(axis=-1)[0]
    assert not difference[: world.frame].any()
    assert (difference[world.frame :] > 1e-4).all()  # an action changes the frames after it, through the cache
    assert world.sample_next._cache_size() == 1
    assert np.isfinite(pipeline.decode(world.to_latents(cached)).frames).all()


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
    source, values = Run.open(run).runtime.clips, {}
    for entry in json.loads((run / "samples" / "prompts.json").read_text()):
        index = next(index for index, info in enumerate(source.infos) if info.caption == entry["prompt"])
        clips = decode(run / "samples" / entry["file"]), decode(source[index])
        motion, expected = (np.diff(clip.frames.astype(int), axis=0) for clip in clips)
        values[entry["file"]] = 2.0 * np.abs(motion - expected).mean()
    assert {file: entry["motion_error"] for file, entry in written["samples"].items()} == pytest.approx(values)
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
    experiment = StagedExperiment(name="contrastive", data=data, stages=stages, log_every=1, save_every=1)
    clips, files = (tiny_run / "data").resolve(), ("contrastive/weights.safetensors", "captions/embeddings.json")
    run = StagedRun.create(tmp_path / "whole", experiment)
    run.prepare(clips)
    with pytest.raises(MissingError, match=r"stage captions reads .*contrastive/weights\.safetensors"):
        stages[1].is_due(run.runtime)
    run.run_stages()
    written = [(run.folder / file).stat().st_mtime_ns for file in files]
    entries = read_metrics(run.folder / "contrastive" / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2]
    assert all(0 <= entry["accuracy"] <= 1 for entry in entries)

    interrupted = StagedRun.create(tmp_path / "parts", experiment)
    interrupted.prepare(clips)
    with monkeypatch.context() as patch:
        interrupt(patch, call=2, how="killed")
        with pytest.raises(KeyboardInterrupt):
            interrupted.run_stages()
    wait_until(lambda: interrupted.runtime.open_checkpoints("contrastive").latest() == 1)
    StagedRun.open(tmp_path / "parts").run_stages()
    for file in files:
        assert (tmp_path / "parts" / file).read_bytes() == (run.folder / file).read_bytes()

    StagedRun.open(run.folder).run_stages()  # nothing is done again
    assert [(run.folder / file).stat().st_mtime_ns for file in files] == written
    config = tmp_path / "config.py"
    document = config_json.to_json(experiment)
    config.write_text(f"from dit_video.core import config_json\nEXPERIMENT = config_json.from_json({document})")
    ended = script("experiments/train.py", config, "--data", clips, "--workdir", tmp_path / "script", "--no-cache")
    assert ended.code == 0, ended.err
    assert (tmp_path / "script" / files[1]).read_bytes() == (run.folder / files[1]).read_bytes()

    with pytest.raises(UserError, match=r"name='denoiser' is invalid: .* Use another name"):
        dataclasses.replace(tiny.EXPERIMENT, stages=(dataclasses.replace(contrastive, name="denoiser"),))
    both = Run(folder=tmp_path, experiment=dataclasses.replace(tiny.EXPERIMENT, stages=stages), command="")
    assert [stage.name for stage in both.stages] == ["autoencoder", "contrastive", "captions", "latents", "denoiser"]


def test_a_config_names_registered_classes_only(add_package, tmp_path, monkeypatch):
    solver = add_package("their_sampler", "adams_sampler").Adams(share=0.4)
    written = config_json.to_json(solver)
    assert config_json.from_json(written) == solver
    monkeypatch.setattr(registry, "_CLASSES", {})
    with pytest.raises(UserError, match=r"'their_sampler:Adams' lies outside dit_video and is not registered"):
        config_json.from_json(written)
    with pytest.raises(TypeError, match=r"register it: dit_video\.core\.registry\.register"):
        config_json.to_json(solver)


def test_an_installed_package_registers_by_its_entry_point(add_package, tmp_path, monkeypatch):
    written = config_json.to_json(add_package("their_sampler", "adams_sampler").Adams())
    monkeypatch.setattr(registry, "_CLASSES", {})
    sys.modules.pop("their_sampler")
    registry.load_entry_points.cache_clear()
    installed = tmp_path / "their_package-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[dit_video]\nsamplers = their_sampler\n")
    assert type(config_json.from_json(written)).__name__ == "Adams"
    registry.load_entry_points.cache_clear()
