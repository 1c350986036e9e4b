"""Extensions of a training without an edit of the package: one file of another package, and one line."""

import dataclasses

import jax
import numpy as np
import pytest

import dit_video
from dit_video.core.errors import MissingError, UserError
from dit_video.core.trees import flatten
from dit_video.data.latents.cache import LatentSource
from dit_video.experiment import AllWeights, LoraAdapters, Run, Student
from dit_video.experiment.replay import replay
from dit_video.nn import LoraConfig
from dit_video.sampling.pipeline import Request
from dit_video.sampling.preparation import check_requests
from dit_video.training.hooks.hash_chain import CHAIN_FILE, read_chain
from dit_video.training.hooks.logging import read_metrics
from dit_video.training.losses.distillation import ConsistencyDistillation
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from support.extending import replace_backbone, shorten, train_by_script
from support.latents import generate_latents

pytestmark = pytest.mark.slow


def test_an_alignment_of_features(add_package, tiny, tiny_run, tmp_path, monkeypatch, script):
    """It is in the config: a run is killed and continued by train.py, replayed, and opened at a step, with it."""
    theirs = add_package("their_alignment", "alignment")
    loss = theirs.Alignment(schedule=Constant(warmup=4), blocks=(0,))
    experiment = shorten(replace_backbone(tiny.EXPERIMENT, layers=2), tiny_run)
    monitoring = dataclasses.replace(experiment.monitoring, validate_every=6, validation_batches=1)
    experiment = dataclasses.replace(experiment, save_every=1, log_every=1, monitoring=monitoring)
    experiment = experiment.replace_stage("denoiser", steps=6)
    aligned = experiment.replace_stage("denoiser", auxiliary=(loss,))
    clips = (tiny_run / "data").resolve()
    Run.create(tmp_path / "plain", experiment).train(clips)
    checked = dataclasses.replace(aligned, monitoring=dataclasses.replace(monitoring, self_check=True))
    Run.create(tmp_path / "run", checked).train(clips)
    train_by_script(aligned, clips, tmp_path / "parts", interrupted="denoiser", monkeypatch=monkeypatch, script=script)

    runs = {name: tmp_path / name for name in ("plain", "run", "parts")}
    plain, whole, parts = ((run / "pipeline" / "denoiser.safetensors").read_bytes() for run in runs.values())
    assert plain != whole == parts
    entries = read_metrics(runs["parts"] / "denoiser" / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    for number, entry in enumerate(entries):
        weight = loss.weight * min(1, 0.25 + 0.75 * number / 4)
        assert entry["loss"] == pytest.approx(entry["loss_denoising"] + weight * entry["loss_alignment"], rel=1e-5)
    assert {"validation_loss", "validation_loss_alignment"} < entries[-1].keys()
    assert (runs["run"] / "denoiser" / "self_check.jsonl").read_text() == ""

    run = Run.open(runs["parts"])
    assert run.experiment.denoiser.auxiliary == (loss,)
    states = [record["state"] for record in read_chain(run.folder / "denoiser" / CHAIN_FILE) if "state" in record]
    assert any("params/auxiliary/alignment/out/kernel" in state for state in states)
    assert replay(run, first=0, last=3).result == "same bits"
    pipelines = [dit_video.load(runs["parts"], step=step, ema=0) for step in (5, 6)]
    assert [set(each.denoiser_params) for each in pipelines] == [{"backbone", "text"}] * 2
    first, last = (each.denoiser_params["backbone"]["blocks"] for each in pipelines)
    assert min(jax.tree.leaves(jax.tree.map(lambda *pair: np.abs(np.subtract(*pair)).max(), first, last))) > 0
    assert np.isfinite(generate_latents(pipelines[0], "a red circle", steps=2)).all()

    for changed in (experiment, aligned.replace_stage("denoiser", auxiliary=(dataclasses.replace(loss, weight=1.0),))):
        with pytest.raises(UserError, match=r"holds a run of another config \(denoiser.auxiliary"):
            Run.create(runs["run"], changed)
    longer = aligned.replace_stage("denoiser", steps=8)
    amended = Run.create(runs["run"], longer)
    changes = {change.path for each in amended.amendments for change in each.changes}
    assert changes == {"denoiser.steps", "monitoring.self_check"}


def test_a_conditioning_with_an_encoder_in_the_folder_of_the_run(add_package, tiny, tiny_run, tmp_path, monkeypatch):
    """It is opened once for a run, before the first stage, and once for a pipeline; never for what reads no clips."""
    theirs, opened = add_package("their_style", "style_encoder"), []
    open_encoder = theirs.StyleEncoder.open
    monkeypatch.setattr(theirs.StyleEncoder, "open", lambda *args: (opened.append(args[1]), open_encoder(*args))[1])
    style, kernel = theirs.StyleEncoder(), np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    images = {"style": np.full((16, 16, 3), [255, 0, 0], np.uint8)}, {"style": np.full((16, 16, 3), 0, np.uint8)}
    experiment = shorten(replace_backbone(tiny.EXPERIMENT, conditioning=(style,)), tiny_run)
    experiment = dataclasses.replace(experiment.replace_stage("denoiser", steps=4), save_every=1)
    for is_cached in (True, False):
        data = dataclasses.replace(experiment.data, cache_latents=is_cached)
        monitoring = dataclasses.replace(experiment.monitoring, validate_every=2, validation_batches=1)
        folder = tmp_path / f"run_{is_cached}"
        run = Run.create(folder, dataclasses.replace(experiment, data=data, monitoring=monitoring))
        with pytest.raises(MissingError, match=r"style.npy does not exist"):
            run.train((tiny_run / "data").resolve())
        assert not (folder / "latents").exists()
        np.save(folder / "style.npy", kernel)
        opened.clear()
        Run.open(folder).train()
        assert opened == [folder]

        opened.clear()
        Run.open(folder).train()  # is finished
        pipelines = [dit_video.load(folder), dit_video.load(folder, step=3)]
        for pipeline in pipelines:
            red, black = (generate_latents(pipeline, "a", steps=2, conditioning=image) for image in images)
            assert np.abs(red - black).max() > 0
            check_requests(pipeline.config, [Request("a", conditioning=images[0])], pipeline.config.sampling)
        assert opened == [folder] * 2
        pipelines[0].save(tmp_path / f"moved_{is_cached}")
        moved = dit_video.load(tmp_path / f"moved_{is_cached}")
        assert np.isfinite(generate_latents(moved, "a", steps=2)).all()
        with pytest.raises(MissingError, match=rf"moved_{is_cached}/style.npy does not exist"):
            generate_latents(moved, "a", steps=2, conditioning=images[0])

    source = LatentSource(tmp_path / "run_True" / "latents")
    values = np.stack([source.read_field(index, style.field) for index in range(len(source))])
    assert values.std(axis=0).min() > 0


@pytest.mark.parametrize("kind", ["weights", "adapters"])
def test_an_alignment_beside_initial_weights(add_package, tiny, tiny_run, tmp_path, kind):
    """Its head begins at random, and is trained with the weights or with adapters to them."""
    theirs, start = add_package("their_alignment", "alignment"), str(tiny_run)
    lora = LoraConfig(rank=2, targets=(r"^backbone/blocks/.*kernel$",))
    own = AllWeights(init_from=start) if kind == "weights" else LoraAdapters(init_from=start, lora=lora)
    optimizer = AdamW(learning_rate=1e-2, schedule=Constant(warmup=0))
    options = {"train": own, "auxiliary": (theirs.Alignment(),), "optimizer": optimizer}
    experiment = shorten(tiny.EXPERIMENT, tiny_run).replace_stage("denoiser", **options)
    monitoring = dataclasses.replace(experiment.monitoring, self_check=True)
    experiment = dataclasses.replace(experiment, save_every=1, monitoring=monitoring)
    run = Run.create(tmp_path / "run", experiment)
    run.train((tiny_run / "data").resolve())
    assert (run.folder / "denoiser" / "self_check.jsonl").read_text() == ""
    assert replay(run, first=0, last=2).result == "same bits"
    before, after = (flatten(dit_video.load(folder).denoiser_params) for folder in (tiny_run, run.folder))
    moved = {path for path, leaf in after.items() if np.abs(leaf - before[path]).max() > 0}
    assert before.keys() == after.keys()
    assert "backbone/blocks/qkv/kernel" in moved
    saved = flatten(dit_video.load(run.folder, step=2).denoiser_params)
    for path, leaf in saved.items():
        np.testing.assert_allclose(leaf, after[path], atol=1e-6, err_msg=path)


def test_stages_share_the_heads_of_their_losses(add_package, tiny):
    loss = add_package("their_alignment", "alignment").Alignment()
    first = dataclasses.replace(tiny.EXPERIMENT.denoiser, name="first", auxiliary=(loss,))
    second = dataclasses.replace(tiny.EXPERIMENT.denoiser, continues="first")
    stages = tiny.EXPERIMENT.autoencoder, first
    with pytest.raises(UserError, match=r"auxiliary=.*alignment/hidden/kernel.* is invalid: the last one has \{\}"):
        dataclasses.replace(tiny.EXPERIMENT, stages=(*stages, second))
    lighter = dataclasses.replace(second, auxiliary=(dataclasses.replace(loss, weight=0.1),))
    assert dataclasses.replace(tiny.EXPERIMENT, stages=(*stages, lighter)).denoiser == lighter
    student = Student(init_from="teacher", distillation=ConsistencyDistillation())
    with pytest.raises(UserError, match="train=Student has losses of its own"):
        tiny.EXPERIMENT.replace_stage("denoiser", train=student, auxiliary=(loss,))
