"""Distillation of a folder of Wan to an adapter of few steps."""

import dataclasses
import gc
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

import dit_video
from dit_video.core import config_json, trees
from dit_video.core.errors import UserError
from dit_video.diffusion import Guidance, Lcm, RectifiedFlow
from dit_video.experiment.export import LORA_FILE
from dit_video.experiment.recipes.distill import DistillationOptions, make_distillation_experiment
from dit_video.experiment.run import Run
from dit_video.nn import LoraConfig
from dit_video.sampling.pipeline import Pipeline
from dit_video.scenes import shapes
from dit_video.tokens import Grid
from dit_video.training.optim.optimizer import AdamW, Muon
from dit_video.training.step import TrainStep
from support.interruptions import interrupt, wait_for_save
from support.latents import generate_latents
from support.tiny_wan import DIT, TWO, VAE, write_animating_wan, write_wan

OPTIONS = DistillationOptions(
    steps=4,
    intervals=4,
    critic_steps=1,
    sampling_steps=2,
    max_pixels=32 * 48,
    max_frames=5,
    dtype="float32",
    remat="none",
    attention="dense",
    lora=LoraConfig(rank=2, alpha=4.0, targets=(r"^backbone/blocks/.*kernel$",)),
    learning_rate=1e-2,
    warmup=1,
    log_every=2,
    save_every=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Read only."""
    folder = tmp_path_factory.mktemp("wan") / "tiny"
    write_wan(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return shapes.write_folder(tmp_path_factory.mktemp("data") / "clips", count=2, seed=0, sizes=(Grid(5, 32, 48),))


def count_live_kernels():
    """Return the number of arrays on devices that are as large as the down kernels of all layers."""
    shape = (DIT.layers, DIT.mlp_dim, DIT.width)
    return sum(array.shape == shape for array in jax.live_arrays())


class Distilled(NamedTuple):
    folder: Path
    """Folder of the finished run, to be read only."""
    num_base_copies: list[int]
    """Number of copies of the base weights after each step."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("consistency", marks=[pytest.mark.slow, pytest.mark.nightly]),
        pytest.param("dmd", marks=pytest.mark.slow),
    ],
)
def distillation(request, folder, clips, tmp_path_factory):
    experiment = make_distillation_experiment(folder, dataclasses.replace(OPTIONS, method=request.param))
    run = Run.create(tmp_path_factory.mktemp("distilled") / "run", experiment)
    gc.collect()  # arrays of earlier tests would be subtracted, and freed later
    before, counts, compile_step = count_live_kernels(), [], TrainStep.compile

    def compile_counting(*arguments, **options):
        step = compile_step(*arguments, **options)

        def count_and_step(state, batch):
            result = jax.block_until_ready(step(state, batch))
            counts.append(count_live_kernels() - before)
            return result

        return count_and_step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "compile", compile_counting)
        run.train(clips)
    return Distilled(run.folder, counts)


@pytest.fixture(scope="module")
def distilled(distillation):
    return distillation.folder


def sample_few_steps(pipeline, config):
    """Sample a pipeline's weights as a config says; a folder's own schedule has slightly other times."""
    parameters = {"autoencoder": pipeline.codec.params, "denoiser": pipeline.denoiser_params}
    return generate_latents(Pipeline(config, **parameters), "a red ball", size=(5, 16, 16))


def test_the_experiment_of_a_student_follows_from_the_folder(folder):
    experiment = make_distillation_experiment(folder, dataclasses.replace(OPTIONS, dtype=None, remat=None))
    denoiser, model = experiment.denoiser, experiment.model
    assert experiment.name == "tiny-consistency"
    assert (model.autoencoder, experiment.autoencoder_from) == (VAE, str(folder / "vae"))
    assert model.backbone == DIT.replace(dtype="bfloat16", remat="full", attention="dense")
    assert model.process == RectifiedFlow(shift=3.0)
    assert (denoiser.train.init_from, denoiser.lora) == (str(folder), OPTIONS.lora)
    assert denoiser.train.distillation.guidance == 5.0
    assert (experiment.data.max_pixels, experiment.data.max_frames, model.fps) == (32 * 48, 5, 16.0)
    sampling = experiment.sampling
    assert (sampling.steps, sampling.guidance, sampling.solver) == (2, Guidance(scales={"text": 1.0}), Lcm())
    assert config_json.from_json(json.loads(json.dumps(config_json.to_json(experiment)))) == experiment
    assert (type(denoiser.optimizer), denoiser.optimizer.learning_rate) == (AdamW, 1e-2)
    full = make_distillation_experiment(folder, DistillationOptions(train="full", method="dmd"))
    assert (full.denoiser.lora, type(full.denoiser.optimizer)) == (None, Muon)
    assert (full.denoiser.optimizer.learning_rate, full.data.max_frames) == (3e-4, 81)


def test_the_exported_adapter_makes_the_student_of_the_folder(folder, distilled):
    teacher, student = dit_video.load(folder, dtype="float32"), dit_video.load(distilled)
    adapted = teacher.load_lora(distilled / LORA_FILE)
    assert (student.config.sampling.steps, student.config.sampling.solver) == (2, Lcm())
    few = sample_few_steps(student, student.config)
    np.testing.assert_allclose(sample_few_steps(adapted, student.config), few, atol=1e-5)
    assert np.abs(sample_few_steps(teacher, student.config) - few).max() > 1e-2


def test_only_adapted_kernels_differ_from_the_teachers(folder, distilled):
    teacher, student = dit_video.load(folder, dtype="float32"), dit_video.load(distilled)
    before, after = (trees.flatten(each.denoiser_params) for each in (teacher, student))
    targets = {path for path in before if path.startswith("backbone/blocks/") and path.endswith("kernel")}
    for path, leaf in before.items():
        if path in targets:
            assert np.abs(after[path] - leaf).max() > 1e-4, path
        else:
            np.testing.assert_array_equal(after[path], leaf, err_msg=path)
    largest = max(before[path].size for path in targets)
    (metadata,) = (distilled / "denoiser" / "checkpoints").glob("4/meta/metadata")
    assert max(np.prod(entry["shape"]) for entry in json.loads(metadata.read_text())["arrays"].values()) < largest / 2


def test_the_teachers_weights_are_in_memory_once(distillation):
    assert distillation.num_base_copies == [1] * OPTIONS.steps


@pytest.mark.slow
def test_an_interrupted_distillation_ends_with_the_same_adapter(distilled, clips, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    ignored = shutil.ignore_patterns("denoiser", "pipeline", "*.safetensors")
    shutil.copytree(distilled, folder, ignore=ignored, symlinks=True)
    with monkeypatch.context() as patch:
        interrupt(patch, call=4, how="killed")
        with pytest.raises(KeyboardInterrupt):
            Run.open(folder).train(clips)
    wait_for_save(folder / "denoiser", 2)
    assert np.isfinite(jax.tree.leaves(Run.open(folder).newest_pipeline().denoiser_params)[0]).all()
    Run.open(folder).train(clips)
    assert (folder / LORA_FILE).read_bytes() == (distilled / LORA_FILE).read_bytes()


def test_models_with_conditioning_frames_or_two_experts_are_refused(tmp_path):
    write_wan(tmp_path / "two", **TWO)
    write_wan(tmp_path / "token", backbone=dataclasses.replace(DIT, time="token"))
    write_animating_wan(tmp_path / "animating")
    for name in ("two", "token", "animating"):
        with pytest.raises(UserError, match="distil a text-to-video model with one denoiser"):
            make_distillation_experiment(tmp_path / name)
