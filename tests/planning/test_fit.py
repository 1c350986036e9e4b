"""The search for options that make a training or a sampler fit into a memory."""

import dataclasses
import json

import pytest

from dit_video.core.errors import UserError
from dit_video.distributed import Parallelism
from dit_video.experiment import AllWeights, LoraAdapters
from dit_video.planning import Topology
from dit_video.planning.fit import apply_settings, fit, list_settings
from dit_video.planning.plan import plan_experiment
from dit_video.tokens import PackedShape
from dit_video.training.optim.ema import EmaConfig
from dit_video.training.optim.optimizer import Adafactor, AdamW
from dit_video.training.optim.schedules import Constant
from support.marks import mark_slow_except

GPUS = Topology.parse("h100:2")


@pytest.fixture
def training(tiny):
    """Return a training whose state is large enough to be sharded, and whose activations need most of the memory."""
    experiment = dataclasses.replace(tiny.EXPERIMENT, parallel=Parallelism(data=2)).replace_stage(
        "denoiser", batch=4, optimizer=AdamW(schedule=Constant(warmup=1)), averages=EmaConfig(decays=(0.5,))
    )
    experiment = experiment.replace_model(layout=PackedShape(tokens=768, text=96, segments=3))
    return experiment.replace_backbone(width=128, layers=4)


def get_peak(experiment, part="denoiser"):
    return plan_experiment(experiment, GPUS, part=part).memory.peak


def get_options(combination):
    return {setting.option for setting in combination.settings}


def test_what_fits_as_configured_needs_no_options(training):
    result = fit(training, GPUS, get_peak(training))
    assert [combination.settings for combination in result.fitting] == [()]
    assert "fits as configured" in str(result)


@pytest.mark.parametrize("part", mark_slow_except(["sampler"], ["denoiser", "sampler"]))
def test_what_is_listed_fits_and_needs_all_of_its_settings(training, part):
    """Each combination is planned as its options say, with and without each of them."""
    limit = int(0.6 * get_peak(training, part))
    result = fit(training, GPUS, limit, part=part)
    assert result.fitting
    seconds = [combination.seconds_per_row for combination in result.fitting]
    assert seconds == sorted(seconds)
    for combination in result.fitting:
        changed = apply_settings(training, combination.settings)
        assert combination.memory <= limit
        assert get_peak(changed, part) == pytest.approx(combination.memory, rel=0.02)
        for setting in combination.settings:
            others = [other for other in combination.settings if other != setting]
            assert get_peak(apply_settings(training, others), part) > limit
    singles = {option for each in result.fitting if len(each.settings) == 1 for option in get_options(each)}
    assert "--rows" in singles
    assert singles.isdisjoint(option for each in result.insufficient for option in get_options(each))
    assert {option for each in result.insufficient for option in get_options(each)}


def test_only_options_that_the_experiment_has_are_tried(training):
    names = set(list_settings(training, "denoiser", 2))
    backbone = {"model.backbone.remat", "model.backbone.dtype"}
    trained = {"denoiser.accumulation_steps", "denoiser.optimizer", "denoiser.averages"}
    assert names == {"--parallel", "--rows"} | backbone | trained
    sampler = {"--parallel", "--rows", "model.backbone.dtype", "sampling.branch_evaluation"}
    assert set(list_settings(training, "sampler", 2)) == sampler
    changed = training.replace_stage(
        "denoiser",
        averages=EmaConfig(),
        optimizer=Adafactor(schedule=Constant(warmup=1)),
        train=AllWeights(init_from="weights"),
        batch=1,
    )
    changed = dataclasses.replace(changed.replace_backbone(dtype="bfloat16"), parallel=Parallelism())
    settings = list_settings(changed, "denoiser", 1)
    assert set(settings) == {"model.backbone.remat", "denoiser.train"}  # one device has one mesh
    (adapters,) = settings["denoiser.train"]
    assert isinstance(adapters.apply(changed).denoiser.train, LoraAdapters)
    assert not adapters.keeps_result


def test_settings_are_printed_as_options_of_the_command(training):
    settings = list_settings(training, "denoiser", 2)
    printed = {str(setting) for each in settings.values() for setting in each}
    expected = {"--parallel fsdp=2", "--rows 2", "--set model.backbone.remat=full"}
    expected |= {"--set denoiser.accumulation_steps=2", "--set denoiser.optimizer=Adafactor(...)"}
    assert expected <= printed
    ring = dataclasses.replace(training, parallel=Parallelism(context_attention="ring"))
    assert "--parallel context=2,context_attention=ring" in map(str, list_settings(ring, "denoiser", 2)["--parallel"])


@pytest.mark.nightly
def test_adapters_save_the_state_of_the_optimizer(training):
    experiment = training.replace_stage("denoiser", batch=4, train=AllWeights(init_from="weights"))
    (adapters,) = list_settings(experiment, "denoiser", 2)["denoiser.train"]
    limit = int(1.02 * get_peak(adapters.apply(experiment)))
    assert limit < get_peak(experiment)
    result = fit(experiment, GPUS, limit)
    assert {"denoiser.train"} in [get_options(each) for each in result.fitting]


@pytest.mark.slow
def test_what_cannot_fit_at_all_is_said_with_the_least_that_it_needs(training):
    result = fit(training, GPUS, 2**16)
    assert result.fitting == ()
    text = str(result)
    assert "nothing fits: the least of" in text
    assert "not enough alone" in text
    assert result.smallest.memory > 2**16
    least = min(each.memory for each in result.insufficient)
    assert result.smallest.memory < least
    planned = get_peak(apply_settings(training, result.smallest.settings))
    assert planned == pytest.approx(result.smallest.memory, rel=0.02)
    document = json.loads(json.dumps(result.to_json()))
    assert document["fitting"] == []
    assert document["smallest"]["settings"]["denoiser.optimizer"] == "Adafactor(...)"
    assert {"model.backbone.remat", "--rows"} <= set(document["smallest"]["settings"])


def test_a_mesh_for_other_devices_is_replaced(training):
    experiment = dataclasses.replace(training, parallel=Parallelism(data=1, fsdp=64))
    result = fit(experiment, GPUS, 60 * 2**30)
    assert result.configured is None
    assert [get_options(each) for each in result.fitting] == [{"--parallel"}]
    assert "as configured: the mesh is for other devices" in str(result)


def test_what_cannot_be_searched_is_refused(training):
    with pytest.raises(UserError, match=r"part=autoencoder is invalid: .* use --set"):
        fit(training, GPUS, part="autoencoder")
    message = r"200.00 GiB is invalid: a device of h100:2 has 67.06 GiB\. Use 68664MiB or less"
    with pytest.raises(UserError, match=message):
        fit(training, GPUS, 200 * 2**30)
    odd = training.replace_stage("denoiser", batch=1)
    with pytest.raises(UserError, match=r"h100:7 is invalid: no mesh .* Use fewer chips"):
        fit(odd, Topology.parse("h100:7"))
