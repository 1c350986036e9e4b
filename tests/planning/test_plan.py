"""Plans of a tiny experiment: analytic for absent hardware, and compiled for simulated devices."""

import dataclasses
import json

import jax
import pytest

from dit_video.core.errors import UserError
from dit_video.core.trees import count_values, flatten
from dit_video.distributed import MeshConfig, make_mesh
from dit_video.distributed.mesh import make_abstract_mesh
from dit_video.experiment.recipes.finetune import FineTuningOptions, make_finetuning_experiment
from dit_video.models.autoencoders import AdversarialConfig, AutoencoderObjective
from dit_video.models.backbones.flops import count_forward_flops
from dit_video.models.backbones.unet import UnetConfig
from dit_video.planning import Topology, compile_step
from dit_video.planning.plan import plan_experiment
from dit_video.planning.steps import fill_row, plan_step
from dit_video.planning.suggest import list_candidates, suggest
from dit_video.tokens import CanvasShape, Grid
from support.devices import check_on_eight_devices
from support.marks import mark_slow_except
from support.tiny_clip import VISION
from support.tiny_vace import write_vace
from support.tiny_wan import write_animating_wan

HALF = Grid(1, 2, 2)
GPUS = Topology.parse("h100:8")


@pytest.fixture
def two_rows(tiny):
    return tiny.EXPERIMENT


@pytest.fixture
def eight_rows(two_rows):
    return dataclasses.replace(two_rows, denoiser=dataclasses.replace(two_rows.denoiser, batch=8))


def test_absent_hardware_is_planned_analytically(eight_rows):
    mesh = MeshConfig(fsdp=2)
    plan = plan_experiment(eight_rows, GPUS, mesh=mesh, steps=3600, price=2.0)
    assert (plan.method, plan.fits, plan.devices, plan.rows) == ("analytic", True, 8, 8)
    assert plan.mesh == {"data": 4, "fsdp": 2, "tensor": 1, "context": 1}
    memory = plan.memory
    assert memory.peak == memory.state + memory.activations + memory.temporary
    assert 0 < memory.parameters <= memory.ema
    assert plan.executed_flops == plan.model_flops > 0  # nothing is computed twice
    assert plan.times is not None
    assert plan.mfu(plan.times.apart) <= plan.mfu(plan.times.overlapped) < 1
    assert plan.chip_hours(2.0) == 3600 * 2.0 * 8 / 3600
    document = json.loads(json.dumps(plan.to_json()))
    assert document["topology"] == "h100:8"
    assert document["apart"]["price"] == pytest.approx(2.0 * document["apart"]["chip_hours"])
    text = str(plan)
    for word in ("analytic", "fits", "parameters", "optimizer", "ema", "activations", "MFU", "chip-hours"):
        assert word in text


def test_a_unet_on_canvases_is_planned(two_rows):
    backbone = UnetConfig(channels=4, context_width=16, width=8, heads=2, groups=4)
    canvas = CanvasShape(size=Grid(3, 6, 8), text=96, segments=3, cell=backbone.size_multiple, padding=HALF)
    denoiser = dataclasses.replace(two_rows.denoiser, backbone=backbone, layout=canvas)
    experiment = dataclasses.replace(two_rows, denoiser=denoiser)
    clips = fill_row(experiment)
    assert sum(clips) <= canvas.tokens
    plans = [plan_step(experiment, part, make_mesh(MeshConfig()), clips=clips) for part in ("denoiser", "sampler")]
    assert plans[0].model_flops == 3 * plans[0].costs.forward_flops > 0
    for plan in plans:
        assert any(leaf.shape == (2, 144, 4) for leaf in jax.tree.leaves(plan.arguments))  # the tokens


@pytest.mark.parametrize(
    ("topology", "price", "says"),
    [
        ("h100:8", None, "; price: aws.amazon.com"),
        ("h100:8", 2.0, "at $2.00 an hour"),
        ("b200:8", None, "no public price of b200 is known: set one with --price"),
        ("b200:8", 6.0, "at $6.00 an hour"),
    ],
)
def test_a_plan_states_the_source_of_its_price(eight_rows, topology, price, says):
    text = str(plan_experiment(eight_rows, Topology.parse(topology), price=price))
    assert says in text
    assert price is None or "price:" not in text


def test_recomputation_counts_as_executed_but_not_as_model_flops(eight_rows):
    once, twice = (plan_experiment(eight_rows.replace_backbone(remat=remat), GPUS) for remat in ("none", "full"))
    assert twice.model_flops == once.model_flops
    assert once.executed_flops < twice.executed_flops <= once.executed_flops * 4 / 3


@pytest.mark.slow
@pytest.mark.parametrize(("train", "passes"), [("full", 3), ("lora", 2)])
def test_a_plan_of_image_to_video_fine_tuning_counts_image_tokens_and_adapters(tmp_path, train, passes):
    """Rows hold image latents and image tokens too, and adapters need no gradients of the weights."""
    write_animating_wan(tmp_path / "wan")
    tuning = FineTuningOptions(max_pixels=32 * 48, max_frames=5, dtype="float32", train=train)
    experiment = make_finetuning_experiment(tmp_path / "wan", tuning)
    plan = plan_experiment(experiment, Topology.parse("h100:1"), clips=2)
    backbone, rows = experiment.model.backbone, experiment.model.row_shape
    text = min(experiment.model.text_encoder.max_tokens, rows.text // 2)
    context = {"texts": [text] * 2, "images": [VISION.tokens] * 2}
    forward = count_forward_flops(backbone, [rows.tokens // 2] * 2, **context)
    assert plan.model_flops == passes * forward * experiment.denoiser.batch
    compiled = plan_step(experiment, "denoiser", make_mesh(MeshConfig()), clips=[rows.tokens])
    batch = compiled.arguments[1]
    assert batch.fields["cond_latents"].shape == batch.tokens.shape
    assert batch.fields["image_tokens"].shape[1:] == (rows.segments * VISION.tokens, VISION.width)
    compiled.step.lower(*compiled.arguments)


@pytest.mark.nightly
@pytest.mark.parametrize("part", mark_slow_except(["sampler"], ["denoiser", "sampler"]))
def test_a_model_with_control_is_planned(tmp_path, part):
    """Control layers count as blocks, and rows hold the control and its strengths."""
    write_vace(tmp_path / "vace")
    tuning = FineTuningOptions(max_pixels=32 * 48, max_frames=5, dtype="float32", sampling_steps=2)
    experiment = make_finetuning_experiment(tmp_path / "vace", tuning)
    plan = plan_experiment(experiment, Topology.parse("h100:1"), part=part)
    config = experiment.denoiser
    forward = count_forward_flops(config.backbone, [config.row_shape.tokens], [config.text.max_tokens])
    assert plan.model_flops == forward * (2 if part == "denoiser" else 4)  # adapters; two steps of two branches
    compiled = plan_step(experiment, part, make_mesh(MeshConfig()), clips=[config.row_shape.tokens])
    batch = compiled.arguments[1] if part == "denoiser" else compiled.arguments.batch.branches[0]
    assert batch.fields["control"].shape[1:] == (config.row_shape.tokens, config.backbone.control_width)
    if part == "sampler":
        assert batch.fields["control_strength"].shape[1:] == (config.row_shape.segments, 2)
    compiled.step.lower(*compiled.arguments)


def test_the_sampler_is_planned_too(eight_rows):
    plan = plan_experiment(eight_rows, GPUS, part="sampler")
    training = plan_experiment(eight_rows, GPUS)
    assert plan.memory.optimizer == plan.memory.ema == 0
    # 2 steps of 2 branches, forwards alone.
    assert plan.model_flops == 4 * training.model_flops / 3
    assert "seconds a batch" in str(plan)
    assert "1 batch: " in str(plan)
    assert plan.parameter_count == training.parameter_count


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        (MeshConfig(data=3), "data=3 does not divide the 8 devices"),
        (MeshConfig(data=4, tensor=2), None),
        (MeshConfig(data=1, tensor=8), "2 heads, which tensor=8"),
        (MeshConfig(data=1, context=8), "12 tokens, which context=8"),
        (MeshConfig(data=8), "2 rows, which data x fsdp=8"),
    ],
)
def test_meshes_that_do_not_divide_the_model_or_batch_are_refused(mesh, says, eight_rows, two_rows):
    if says is None:
        assert plan_experiment(eight_rows, GPUS, mesh=mesh).fits
        return
    with pytest.raises(UserError, match=says):
        plan_experiment(two_rows, GPUS, mesh=mesh)


def test_the_tokens_of_a_row_are_divided_among_its_clips(two_rows):
    assert fill_row(two_rows) == [6, 6]
    assert fill_row(two_rows, 3) == [4, 4, 4]
    with pytest.raises(UserError, match=r"clips=4 is invalid: .* room for 1 to 3"):
        fill_row(two_rows, 4)


@pytest.mark.slow
def test_the_best_of_those_that_fit_is_suggested(two_rows):
    result = list_candidates(two_rows, GPUS)
    assert len({(one.mesh, one.rows, one.remat) for one in result}) == len(result)
    assert {"none", "full"} <= {one.remat for one in result} <= {"none", "full", "attention", "dots_attention"}
    assert all(one.mesh.tensor <= 2 and one.mesh.context <= 2 for one in result)  # there are two heads
    reports = []
    best = suggest(two_rows, GPUS, tries=3, report=reports.append)
    assert best.fits
    assert len(reports) == 3
    assert best.times is not None
    kept = suggest(two_rows, GPUS, rows=4, tries=1)
    assert kept.rows == 4
    with pytest.raises(UserError, match=r"part=autoencoder is invalid: .* set --mesh"):
        suggest(two_rows, GPUS, part="autoencoder")


def test_a_search_without_a_fitting_plan_says_so(two_rows):
    small = dataclasses.replace(GPUS.chip, memory=1000)
    with pytest.raises(UserError, match="nothing on h100:8"):
        suggest(two_rows, dataclasses.replace(GPUS, chip=small))


def test_plans_that_need_absent_hardware_are_refused(eight_rows, two_rows):
    with pytest.raises(UserError, match="run this on h100:8, or plan for a TPU"):
        plan_experiment(two_rows, GPUS, part="autoencoder")
    with pytest.raises(UserError, match="h100:8 is not here; leave it out"):
        plan_experiment(eight_rows, GPUS, measure=True)


@pytest.mark.slow
def test_a_discriminator_adds_to_the_plan_of_an_autoencoder(two_rows):
    """The plan is for a step in which both players move."""
    loss = AutoencoderObjective(adversarial=AdversarialConfig(width=4, layers=1, start_step=1))
    autoencoder = dataclasses.replace(two_rows.autoencoder, loss=loss)
    experiment = dataclasses.replace(two_rows, autoencoder=autoencoder)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    alone, both = (plan_step(each, "autoencoder", mesh, clips=[]) for each in (two_rows, experiment))
    assert both.model_flops > alone.model_flops > 0
    compiled = compile_step(both.step, both.arguments, mesh)
    assert compiled.memory.parameters == 4 * count_values(both.arguments[0].model.params) + 4 * count_values(
        both.arguments[0].discriminator.params
    )


def test_a_sampler_splits_tokens_over_the_context_axis_and_keeps_texts_whole(eight_rows):
    rows = dataclasses.replace(eight_rows.denoiser.row_shape, tokens=16, text=256)
    experiment = dataclasses.replace(eight_rows, denoiser=dataclasses.replace(eight_rows.denoiser, layout=rows))
    mesh = make_abstract_mesh(MeshConfig(data=1, context=2), 2)
    _, state, batch, *_ = plan_step(experiment, "sampler", mesh, clips=[16]).arguments
    split = {path: leaf.sharding.spec for path, leaf in flatten((state, batch)).items() if leaf.ndim > 1}
    along = {path.split("/")[-1] for path, spec in split.items() if "context" in spec}
    assert along == {"x", "tokens", "segments", "positions"}


@pytest.mark.slow
def test_the_planned_memory_is_that_of_the_program_that_runs():
    """The plan is compared with the state of a run on simulated devices and the analysis of its compiled step."""
    check_on_eight_devices("planned_memory.py")
