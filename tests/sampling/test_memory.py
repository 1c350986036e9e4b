"""Memory of weights, counted from configs and compared with devices and machine before any weight is read."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import dit_video
from dit_video.core.errors import UserError
from dit_video.core.memory import name_exhausted_memory
from dit_video.core.offload import Layers, Stages, is_stacked_kernel
from dit_video.core.platform.devices import MemoryLimits, get_memory_limits
from dit_video.core.trees import flatten
from dit_video.families import find_family
from dit_video.families.family import LoadOptions
from dit_video.sampling import memory
from dit_video.sampling.memory import (
    StageBytes,
    check_weight_memory,
    choose_offload,
    count_stage_bytes,
    make_weight_shapes,
)
from dit_video.weights import load_clip_vision
from support.tiny_wan import ANIMATING, DIT, TWO, write_animating_wan, write_wan

STAGES = {
    "text": StageBytes(600, streamed=500, layer=50),
    "backbone": StageBytes(1000, streamed=900, layer=90),
    "autoencoder": StageBytes(100),
}


def make_shapes(folder):
    family, options = find_family(folder), LoadOptions()
    return make_weight_shapes(family.make_config(folder, options), family.make_dtype_fn(options))


def count_bytes(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.nightly
def test_bytes_of_stages_are_those_of_the_weights_that_are_loaded(tmp_path):
    write_animating_wan(tmp_path / "wan", backbone=replace(ANIMATING, layers=3))
    stages = count_stage_bytes(make_shapes(tmp_path / "wan"))
    pipeline = dit_video.load(tmp_path / "wan", offload=Stages())
    params = pipeline.denoiser_params["backbone"]
    assert list(stages) == ["text", "image encoder", "backbone", "autoencoder"]
    assert stages["backbone"].total == count_bytes(params)
    streamed = sum(leaf.nbytes for path, leaf in flatten(params).items() if is_stacked_kernel(path, leaf))
    assert (stages["backbone"].streamed, stages["backbone"].layer) == (streamed, streamed // 3)
    assert stages["autoencoder"] == StageBytes(count_bytes(pipeline.codec.params))
    assert stages["image encoder"].total == count_bytes(load_clip_vision(tmp_path / "wan").params)


def test_two_experts_are_two_stages(tmp_path):
    write_wan(tmp_path / "wan", **TWO)
    stages = count_stage_bytes(make_shapes(tmp_path / "wan"))
    assert stages["backbone"] == stages["low_noise"]


def test_a_mesh_divides_the_bytes_of_the_denoiser(tmp_path):
    write_wan(tmp_path / "wan", backbone=replace(DIT, width=128, mlp_dim=128))
    shapes, mesh = (
        make_shapes(tmp_path / "wan"),
        jax.sharding.AbstractMesh((1, 4, 1, 1), ("data", "fsdp", "tensor", "context")),
    )
    alone, sharded = count_stage_bytes(shapes), count_stage_bytes(shapes, mesh)
    assert alone["backbone"].total / 4 <= sharded["backbone"].total < alone["backbone"].total / 2
    assert alone["text"] == sharded["text"]


@pytest.mark.parametrize(
    ("offload", "platform", "is_large", "device_memory", "chosen"),
    [
        ("auto", "gpu", True, None, Stages()),
        ("auto", "tpu", True, 1250, Stages()),
        ("auto", "gpu", True, 1249, Layers(text=False)),
        ("auto", "gpu", True, 631, Layers()),
        ("auto", "gpu", False, 1249, None),
        ("auto", "cpu", True, None, None),
        (None, "gpu", True, 1249, None),
        (Stages(), "gpu", True, 10, Stages()),
    ],
)
def test_offload_is_chosen_by_the_memory_of_the_device(offload, platform, is_large, device_memory, chosen):
    options = {"is_large": is_large, "platform": platform, "device_memory": device_memory}
    assert choose_offload(offload, STAGES, **options) == chosen


@pytest.mark.parametrize(
    ("offload", "device", "needed", "fix"),
    [
        (None, 1699, 1700, "Use offload=Stages()"),
        (None, 999, 1700, f"Use offload={Layers()}"),
        (Stages(), 999, 1000, f"Use offload={Layers()}"),
        (Layers(), 189, 190, "Use a mesh of several devices, or bfloat16 instead of float32"),
    ],
)
def test_too_little_memory_of_a_device_is_said_with_what_fits(offload, device, needed, fix, monkeypatch):
    monkeypatch.setattr(memory, "format_bytes", str)
    check_weight_memory(STAGES, offload, MemoryLimits(needed, None))
    with pytest.raises(UserError) as error:
        check_weight_memory(STAGES, offload, MemoryLimits(device, None))
    assert f"take {needed} on a device, which has {device}" in str(error.value)
    assert str(error.value).endswith(fix)


def test_a_text_encoder_larger_than_the_denoiser_moves_by_layers_alone():
    stages = {**STAGES, "text": StageBytes(2000, streamed=1900, layer=100)}
    chosen = choose_offload("auto", stages, is_large=True, platform="gpu", device_memory=1500)
    assert chosen == Layers(denoiser=False)
    check_weight_memory(stages, chosen, MemoryLimits(1000, None))
    with pytest.raises(UserError, match=r"weights then take .* Use offload=Layers"):
        check_weight_memory(stages, chosen, MemoryLimits(999, None))


@pytest.mark.nightly
def test_too_little_memory_of_the_machine_is_said_before_weights_are_read(tmp_path, monkeypatch):
    def read(*_):
        raise AssertionError("weights are read")

    write_wan(tmp_path / "wan")
    dit_video.load(tmp_path / "wan").save(tmp_path / "own")
    total = sum(each.total for each in count_stage_bytes(make_shapes(tmp_path / "wan")).values())
    monkeypatch.setattr(memory, "get_memory_limits", lambda: MemoryLimits(None, total - 1))
    monkeypatch.setattr("dit_video.weights.folders.TensorFolder.read", read)
    monkeypatch.setattr("dit_video.weights.folders.TensorFolder.read_chunks", read)
    for folder in (tmp_path / "wan", tmp_path / "own"):
        with pytest.raises(
            UserError, match=r"the model is too large: its weights take .* \(text .*\), this machine has"
        ):
            dit_video.load(folder)


def test_a_machine_need_not_hold_what_the_device_keeps():
    check_weight_memory(STAGES, None, MemoryLimits(2000, 10))
    with pytest.raises(UserError, match="Use a smaller model, a larger machine, or bfloat16 instead of float32"):
        check_weight_memory(STAGES, Stages(), MemoryLimits(2000, 10))
    check_weight_memory(STAGES, Stages(), MemoryLimits(2000, 10), is_sharded=True)


def test_the_memory_of_this_machine_is_known():
    limits = get_memory_limits()
    assert limits.device is None  # a CPU's memory is the machine's
    assert 2**28 < limits.host < 2**50


def test_exhausted_memory_is_an_error_with_a_fix():
    with (
        pytest.raises(UserError, match=r"sampling takes more memory than the device has \(.*\)\. Use less"),
        name_exhausted_memory("sampling", "Use less"),
    ):
        jax.block_until_ready(jax.numpy.zeros(2**50, np.uint8))
    with pytest.raises(ZeroDivisionError), name_exhausted_memory("sampling", "Use less"):
        _ = 1 / 0
