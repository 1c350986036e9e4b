"""Stages in one config: images, then small clips, then all."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dit_video.core import trees
from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.diffusion import RectifiedFlow
from dit_video.experiment import AllWeights, DataConfig, ExpertConfig, LoraAdapters, TemporalWeights
from dit_video.experiment.latents import open_latents
from dit_video.experiment.run import Run
from dit_video.nn import init_params
from dit_video.tokens import Grid, PackedShape
from dit_video.training import trainer
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks import logging
from dit_video.training.optim.ema import EmaConfig
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant, WarmupStableDecay
from dit_video.training.step import GradientStep
from support.interruptions import wait_for_save
from support.training_state import get_state_shapes


@pytest.fixture(scope="module")
def staged(tiny):
    autoencoder, denoiser = tiny.EXPERIMENT.stages
    optimizer = dataclasses.replace(denoiser.optimizer, learning_rate=1e-3, schedule=WarmupStableDecay(warmup=1))
    denoiser = dataclasses.replace(denoiser, steps=4, optimizer=optimizer)
    images = dataclasses.replace(
        denoiser,
        name="images",
        data=DataConfig(max_pixels=16 * 16, max_frames=1),
        layout=PackedShape(tokens=3, text=96, segments=3),
        process=RectifiedFlow(shift=0.5),
        optimizer=dataclasses.replace(optimizer, learning_rate=4e-3, schedule=Constant(warmup=1)),
    )
    small = dataclasses.replace(
        denoiser,
        name="small",
        continues="images",
        steps=3,
        data=DataConfig(max_pixels=16 * 16, max_frames=5),
        batch=4,
    )
    stages = (autoencoder, images, small, dataclasses.replace(denoiser, continues="small"))
    return dataclasses.replace(tiny.EXPERIMENT, stages=stages, log_every=1, save_every=2)


def begun(tiny_run, folder, staged):
    """Return a run whose autoencoder is trained."""
    shutil.copytree(tiny_run, folder, ignore=lambda _, names: {"latents", "denoiser", "pipeline"} & set(names))
    return dataclasses.replace(Run.open(folder), experiment=staged)


@pytest.fixture(scope="module")
def uninterrupted(tiny_run, staged, tmp_path_factory):
    run = begun(tiny_run, tmp_path_factory.mktemp("staged") / "run", staged)
    run.run_stages()
    return run, run.load_pipeline().denoiser_params


@pytest.mark.slow
def test_each_stage_has_data_of_its_own(uninterrupted, staged):
    run, _ = uninterrupted
    latents = [
        open_latents(stage.adapt_run(run), stage.get_folder(run) / "latents") for stage in staged.denoiser_stages
    ]
    assert {Grid(*size) for size in latents[0].sizes.tolist()} == {Grid(1, 2, 2)}
    assert set(latents[1].sizes[:, 0].tolist()) == {1, 2}
    assert set(latents[2].sizes[:, 0].tolist()) == {1, 2, 3}
    assert [stage.get_start_step(run) for stage in staged.denoiser_stages] == [0, 4, 7]
    held_out = set(staged.data.held_out)
    for source in latents:
        assert not held_out & {name.split("@")[0] for name in source.names}
    rows = [read_json(run.folder / path / "rows.json") for path in ("stages/images", "stages/small", "denoiser")]
    assert all(rows)
    assert rows[0] != rows[1] != rows[2]


@pytest.mark.slow
def test_steps_count_on_and_checkpoints_are_of_one_training(uninterrupted):
    run, _ = uninterrupted
    assert [entry["step"] for entry in logging.read_metrics(run.folder / "denoiser" / "metrics.jsonl")] == [
        *range(1, 12)
    ]
    assert Checkpoints(run.folder / "denoiser" / "checkpoints").latest() == 11


@pytest.mark.slow
def test_a_stage_starts_where_the_one_before_ended(tiny_run, staged, tmp_path, monkeypatch, uninterrupted):
    states = {}
    real = GradientStep.compile

    def compile_step(*arguments, **keywords):
        step = real(*arguments, **keywords)

        def watched(state, batch):
            states[int(state.step)] = jax.device_get(state)
            after, figures = step(state, batch)
            states[int(after.step)] = jax.device_get(after)
            return after, figures

        return watched

    seen = {}
    real_run = trainer.Trainer.run

    def noted(self, batches):
        before, state = states.get(self.start_step), real_run(self, batches)
        seen[self.start_step] = (before, states[self.start_step])
        return state

    monkeypatch.setattr(GradientStep, "compile", compile_step)
    monkeypatch.setattr(trainer.Trainer, "run", noted)
    run = begun(tiny_run, tmp_path / "run", staged)
    run.run_stages()
    params = run.load_pipeline().denoiser_params
    for begin in (4, 7):
        ended, started = seen[begin]
        assert ended is started or all(
            np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ended), jax.tree.leaves(started), strict=True)
        )
    moments = trees.flatten(states[4].opt_state)
    assert any(np.abs(leaf).max() > 0 for path, leaf in moments.items() if "/mu/" in path)
    for path, leaf in trees.flatten(uninterrupted[1]).items():
        np.testing.assert_array_equal(leaf, trees.flatten(params)[path], err_msg=path)


def test_every_stage_has_its_own_learning_rate_schedule(staged):
    assert staged.get_stage("images").optimizer.learning_rate == 4e-3
    rates = staged.denoiser.optimizer.make_schedule(steps=staged.denoiser.steps)
    assert [float(rates(step)) for step in (0, 1)] == pytest.approx([1e-3, 1e-3])
    assert float(rates(3)) == pytest.approx(1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("call", "saved"), [(4, 2), pytest.param(6, 4, marks=pytest.mark.nightly)])
def test_an_interrupted_stage_ends_as_the_uninterrupted_one(
    tiny_run, staged, tmp_path, monkeypatch, uninterrupted, call, saved
):
    run = begun(tiny_run, tmp_path / "run", staged)
    real, calls = GradientStep.compile, iter(range(1, 100))

    def compile_step(*arguments, **keywords):
        step = real(*arguments, **keywords)

        def killed(state, batch):
            if next(calls) == call:
                raise KeyboardInterrupt
            return step(state, batch)

        return killed

    with monkeypatch.context() as patch:
        patch.setattr(GradientStep, "compile", compile_step)
        with pytest.raises(KeyboardInterrupt):
            run.run_stages()
    wait_for_save(run.folder / "denoiser", saved)
    run.run_stages()
    params = run.load_pipeline().denoiser_params
    for path, leaf in trees.flatten(uninterrupted[1]).items():
        np.testing.assert_array_equal(leaf, trees.flatten(params)[path], err_msg=path)


@pytest.mark.slow
def test_a_stage_whose_predecessor_lost_its_last_checkpoint_is_refused(uninterrupted, tmp_path, staged):
    folder = shutil.copytree(uninterrupted[0].folder, tmp_path / "run")
    moved = staged.replace_stage("images", steps=8)  # the last begins at 11
    shutil.rmtree(folder / "denoiser" / "checkpoints" / "11" / "state")
    shutil.rmtree(folder / "pipeline")
    run = dataclasses.replace(uninterrupted[0], folder=folder, experiment=moved)
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(UserError, match="has step 10, but this stage begins at step 11"),
    ):
        run.run_stages()


def test_invalid_stages_are_refused(staged):
    def refused(match, **changes):
        with pytest.raises(UserError, match=match):
            staged.replace_stage("small", **changes)

    data = staged.get_stage("small").data
    refused("name='a/b' is invalid", name="a/b")
    refused("name='images' is invalid", name="images")
    refused("stage small: layout.tokens=.* is invalid: a clip of", data=dataclasses.replace(data, max_frames=65))
    refused("stage small: data.held_out applies to all stages", data=dataclasses.replace(data, held_out=("a",)))
    refused("stage small: small.steps=0 is invalid", steps=0)
    refused("stage small: continues=None is invalid: .* Use continues='images'", continues=None)
    refused("stage small: continues='denoiser' is invalid: .* Use continues='images'", continues="denoiser")
    with pytest.raises(UserError, match=r"stage images: continues='small' is invalid: .* Leave it out"):
        staged.replace_stage("images", continues="small")
    with pytest.raises(UserError, match=r"weights=\(0.0,\) is invalid: .* one must be positive"):
        dataclasses.replace(data, weights=(0.0,))
    weighted = dataclasses.replace(staged, data=dataclasses.replace(staged.data, weights=(1.0, 0.0)))
    with pytest.raises(UserError, match=r"stage small: data\.weights weighs 1 data sets, the experiment 2"):
        weighted.replace_stage("small", data=dataclasses.replace(data, weights=(1.0,)))


def test_stages_that_could_not_carry_on_the_state_of_the_one_before_are_refused(staged):
    adamw = AdamW(schedule=Constant(warmup=1))
    elsewhere = {"init_from": "elsewhere"}
    expert = ExpertConfig(expert="low", boundary=0.5, other_folder="elsewhere")
    for changes, name in (
        ({"optimizer": adamw}, "optimizer='AdamW'"),
        ({"train": TemporalWeights()}, r"optimizer\.trainable=.*temporal.*"),
        ({"train": LoraAdapters(**elsewhere)}, r"train\.lora=LoraConfig.*"),
        ({"train": AllWeights(**elsewhere, expert=expert)}, r"train\.expert=ExpertConfig.*"),
        ({"averages": EmaConfig(decays=(0.5,))}, "averages=EmaConfig.*"),
    ):
        with pytest.raises(UserError, match=f"stage small: {name} is invalid: the last one has .* Use the same for"):
            staged.replace_stage("small", **changes)
    # The first one alone begins with initial weights.
    assert staged.replace_stage("images", train=AllWeights(**elsewhere)).get_stage("images").train.init_from


def test_a_stage_weighs_data_sets_as_the_experiment_does_or_by_itself(staged):
    data = dataclasses.replace(staged.get_stage("images").data, weights=(1.0, 0.0))
    weighted = dataclasses.replace(staged, data=dataclasses.replace(staged.data, weights=(0.0, 1.0)))
    weighted = weighted.replace_stage("images", data=data)
    run = Run(folder=Path("none"), experiment=weighted)
    weights = [stage.adapt_run(run).data.weights for stage in weighted.denoiser_stages]
    assert weights == [(1.0, 0.0), (0.0, 1.0), (0.0, 1.0)]


def test_all_stages_share_one_training_state(staged):
    shapes = []
    for number, stage in enumerate(staged.denoiser_stages):
        optimizer = stage.optimizer.make(steps=stage.steps, start_step=number)
        init = functools.partial(init_params, staged.model.backbone.make)
        shapes.append(jax.tree.leaves(get_state_shapes(init, optimizer)))
    assert shapes[0] == shapes[1] == shapes[2]
