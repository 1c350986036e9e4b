"""Plans of a pipeline's stages on one device."""

from dataclasses import replace

import jax
import pytest

import dit_video
from dit_video.core.errors import UserError
from dit_video.core.offload import Layers, Stages, is_stacked_kernel
from dit_video.core.trees import flatten
from dit_video.families.family import LoadOptions
from dit_video.planning import CHIPS, Topology
from dit_video.planning.pipeline import fit_pipeline, plan_pipeline
from dit_video.weights import load_clip_vision
from support.tiny_ltx import SIZE as LTX_SIZE
from support.tiny_ltx import write_ltx
from support.tiny_vace import write_vace
from support.tiny_wan import ANIMATING, DIT, SIZE, TWO, write_animating_wan, write_wan
from support.wan_folders import write_published_folder

CPU = Topology.parse("cpu:1", {**CHIPS, "cpu": replace(CHIPS["v5p"], name="cpu", kind="cpu", memory=2**33)})


def count_bytes(params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder like that of Wan 2.1 I2V."""
    path = tmp_path_factory.mktemp("planned") / "wan"
    write_animating_wan(path, backbone=replace(ANIMATING, layers=2))
    return path


@pytest.mark.slow
def test_each_stage_has_the_weights_that_are_loaded(folder):
    pipeline = dit_video.load(folder, offload=None)
    plan = plan_pipeline(folder, CPU, size=SIZE, options=LoadOptions(offload=Stages()))
    assert [stage.name for stage in plan.stages] == ["text", "image", "encoding", "sampling", "decoding"]
    text, image, encoding, sampling, decoding = plan.stages
    assert image.weights == count_bytes(load_clip_vision(folder).params)
    assert encoding.weights == decoding.weights == count_bytes(pipeline.codec.params)
    assert sampling.weights == count_bytes(pipeline.denoiser_params)
    assert all(stage.activations > 0 for stage in plan.stages)
    assert all(stage.host_weights == stage.other_weights == 0 for stage in plan.stages)
    assert (plan.peak, plan.fits) == (max(stage.peak for stage in plan.stages), True)
    assert plan.to_json()["stages"][3]["weights"] == sampling.weights
    resident = plan_pipeline(folder, CPU, size=SIZE, options=LoadOptions(offload=None))
    total = text.weights + image.weights + decoding.weights + sampling.weights
    assert {stage.weights + stage.other_weights for stage in resident.stages} == {total}


@pytest.mark.parametrize(
    ("write", "size"),
    [
        pytest.param(write_vace, SIZE, marks=pytest.mark.slow),
        pytest.param(write_ltx, LTX_SIZE, marks=pytest.mark.slow),
        pytest.param(
            lambda folder: write_wan(folder, backbone=replace(DIT, time="token")), SIZE, marks=pytest.mark.slow
        ),
    ],
    ids=["control", "keyframes", "time for each token"],
)
def test_models_with_control_keyframes_and_first_frames_are_planned(tmp_path, write, size):
    write(tmp_path / "model")
    pipeline = dit_video.load(tmp_path / "model", offload=None)
    plan = plan_pipeline(tmp_path / "model", CPU, size=size, options=LoadOptions(offload=Stages()))
    assert [stage.name for stage in plan.stages] == ["text", "encoding", "sampling", "decoding"]
    assert plan.stages[2].weights == count_bytes(pipeline.denoiser_params)
    assert plan.stages[1].weights == plan.stages[3].weights == count_bytes(pipeline.codec.params)
    assert all(stage.activations > 0 for stage in plan.stages)


@pytest.mark.slow
def test_stacked_kernels_are_not_on_the_device_if_layers_move(folder):
    params = flatten(dit_video.load(folder, offload=None).denoiser_params)
    plan = plan_pipeline(folder, CPU, size=SIZE, options=LoadOptions(offload=Layers()))
    sampling = next(stage for stage in plan.stages if stage.name == "sampling")
    assert sampling.host_weights == sum(leaf.nbytes for path, leaf in params.items() if is_stacked_kernel(path, leaf))
    assert sampling.weights == count_bytes(params) - sampling.host_weights


@pytest.mark.slow
def test_a_size_and_a_memory_are_said(folder):
    small = replace(CPU, chip=replace(CPU.chip, memory=2**10))
    plan = plan_pipeline(folder, small, size=SIZE)
    assert not plan.fits
    assert "does not fit" in str(plan)
    assert "5 frames of 16x16" in str(plan)
    with pytest.raises(UserError, match="width 20 is not divisible"):
        plan_pipeline(folder, CPU, size=(5, 16, 20))


@pytest.mark.slow
def test_a_memory_is_fitted_by_the_fastest_offload(folder):
    """On a CPU streamed weights count like others: `Layers` gains nothing there."""
    resident = fit_pipeline(folder, CPU, size=SIZE)
    assert (resident.offload, resident.fits) == (None, True)
    peak = max(stage.weights + stage.activations for stage in resident.stages)
    assert peak < resident.peak
    staged = fit_pipeline(folder, CPU, peak, size=SIZE)
    assert (staged.offload, staged.limit, staged.peak, staged.fits) == (Stages(), peak, peak, True)
    too_small = fit_pipeline(folder, CPU, peak - 1, size=SIZE)
    assert (too_small.offload, too_small.fits) == (Layers(), False)
    with pytest.raises(UserError, match=r"memory of 9\.00 GiB is invalid: a device of cpu:1 has .* Use \d+MiB or less"):
        fit_pipeline(folder, CPU, 9 * 2**30, size=SIZE)


def test_devices_that_are_not_here_are_refused(folder):
    with pytest.raises(UserError, match=r"h100:1 is invalid: .* planned by compiling\. Use a TPU"):
        plan_pipeline(folder, Topology.parse("h100:1"), size=SIZE)


@pytest.mark.slow
def test_two_experts_are_planned_for_a_tpu_that_is_not_here(tmp_path):
    write_wan(tmp_path / "wan", backbone=replace(DIT, width=128, mlp_dim=256, layers=4), **TWO)
    options = LoadOptions(offload=Stages())
    plan = plan_pipeline(tmp_path / "wan", Topology.parse("v5p:2x2x1"), size=SIZE, options=options)
    assert [stage.name for stage in plan.stages][1:] == ["sampling", "second expert", "decoding"]
    assert plan.stages[1].weights == plan.stages[2].weights > 0
    assert plan.fits


@pytest.mark.nightly
def test_a_published_model_samples_in_the_memory_of_a_small_gpu(tmp_path):
    """Its clips of 81x480x832 take less than 12 GB on one chip; larger models are in docs/benchmarks.md."""
    folder = tmp_path / "Wan2.1-T2V-1.3B-Diffusers"
    write_published_folder(folder, folder.name)
    plan = fit_pipeline(folder, Topology.parse("v5p:2x2x1"), 12 * 10**9)
    assert (plan.size, plan.offload, plan.fits) == ((81, 480, 832), Stages(), True), str(plan)
    assert plan.peak < 12 * 10**9
