import math
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.distributed import AXES, Parallelism, Slices, make_mesh
from dit_video.distributed.mesh import (
    _resolve_sizes,
    arrange_hybrid_mesh,
    count_axis_slices,
    describe_slow_axes,
    format_parallelism,
    make_abstract_mesh,
    parse_parallelism,
)


def test_one_device_makes_a_mesh_in_auto_mode():
    mesh = make_mesh(Parallelism(), jax.devices()[:1])
    assert mesh.axis_names == AXES == ("data", "fsdp", "tensor", "context")
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("config", "count", "sizes"),
    [
        (Parallelism(), 8, (8, 1, 1, 1)),
        (Parallelism(fsdp=2), 8, (4, 2, 1, 1)),
        (Parallelism(data=1, fsdp=-1, context=2), 8, (1, 4, 1, 2)),
        (Parallelism(data=2, fsdp=2, tensor=2), 8, (2, 2, 2, 1)),
        (Parallelism(fsdp=8), 8, (1, 8, 1, 1)),
    ],
)
def test_the_free_axis_takes_what_is_left(config, count, sizes):
    assert _resolve_sizes(config, count) == sizes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Parallelism(fsdp=3), r"fsdp=3 does not divide the 8 devices\. Use fsdp=1 or 2 or 4 or 8"),
        (
            Parallelism(fsdp=4, context=4),
            r"context=4 does not divide the 2 of 8 devices that are left for it\. Use context=1 or 2",
        ),
        (Parallelism(data=2, fsdp=2), r"uses 4 of 8 devices\. Use data=4, or -1"),
        (Parallelism(data=16), "data=16 does not divide the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_sizes_that_do(config, message):
    with pytest.raises(UserError, match=message):
        _resolve_sizes(config, 8)


@pytest.mark.wrong_types
def test_what_is_no_parallelism_is_refused_where_a_mesh_is_made():
    with pytest.raises(UserError, match=r"parallel=Mesh\(.*must be a Parallelism.* Use Parallelism\(data=2"):
        make_mesh(make_mesh(Parallelism(), jax.devices()[:1]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": 2.0}, "data=2.0 is invalid: it must be a whole number"),
        ({"fsdp": True}, "fsdp=True is invalid: it must be a whole number"),
        ({"context_attention": "Ring"}, "context_attention='Ring' is invalid: it must be one of ulysses, ring"),
    ],
)
def test_values_of_another_kind_are_refused_in_the_config(values, message):
    with pytest.raises(UserError, match=message):
        Parallelism(**values)


def test_invalid_sizes_are_refused_in_the_config():
    with pytest.raises(UserError, match="tensor=0 is invalid"):
        Parallelism(tensor=0)
    with pytest.raises(UserError, match="data=-1, fsdp=-1 is invalid: only one"):
        Parallelism(fsdp=-1)


@dataclass(frozen=True)
class Chip:
    """A device of a TPU pod, with the attributes that a mesh reads."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "none"
    device_kind: str = "none"


CHIPS = [Chip(number, number // 4) for number in range(16)]
"""Four slices of four devices."""


def get_slice_indices(config: Parallelism) -> np.ndarray:
    return np.vectorize(lambda chip: chip.slice_index)(arrange_hybrid_mesh(config, CHIPS))


@pytest.mark.parametrize(
    ("config", "along"),
    [
        (Parallelism(fsdp=4), (4, 1, 1, 1)),
        (Parallelism(data=2, fsdp=4, context=2), (2, 2, 1, 1)),
        (Parallelism(data=1, fsdp=2, context=8), (1, 2, 1, 2)),
        (Parallelism(data=4, fsdp=4, slices=Slices(fsdp=4)), (1, 4, 1, 1)),
        (Parallelism(data=4, fsdp=4, slices=Slices(data=2, fsdp=2)), (2, 2, 1, 1)),
    ],
)
def test_slices_lie_along_the_outer_part_of_the_outermost_axes(config, along):
    result = get_slice_indices(config)
    blocks = np.arange(4).reshape(along)
    for axis, count in enumerate(along):
        blocks = np.repeat(blocks, result.shape[axis] // count, axis=axis)
    np.testing.assert_array_equal(result, blocks)
    assert sorted(chip.id for chip in arrange_hybrid_mesh(config, CHIPS).flat) == list(range(16))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Parallelism(data=4, fsdp=4, slices=Slices(data=2)), r"data=2 x .* are 2, there are 4\. Use data=4"),
        (Parallelism(data=2, fsdp=8, slices=Slices(data=4)), r"4 slices do not divide data=2 .* multiple of 4"),
    ],
)
def test_slices_that_do_not_fit_a_mesh_are_refused_with_sizes_that_do(config, message):
    with pytest.raises(UserError, match=message):
        arrange_hybrid_mesh(config, CHIPS)
    with pytest.raises(UserError, match="data=0 is invalid"):
        Slices(data=0)
    with pytest.raises(UserError, match=r"data=2\.0 is invalid"):
        Slices(data=2.0)
    odd = [Chip(number, number // 3) for number in range(9)]
    with pytest.raises(UserError, match=r"9 devices are invalid: .* each of 2 slices"):
        arrange_hybrid_mesh(Parallelism(data=1, fsdp=9), [Chip(n, n % 2) for n in range(9)])
    assert arrange_hybrid_mesh(Parallelism(fsdp=3), odd).shape == (3, 3, 1, 1)


def test_slices_off_the_data_axis_are_warned_of():
    along_data = count_axis_slices(Parallelism(data=4, fsdp=4), 16, 4)
    assert along_data == {"data": 4, "fsdp": 1, "tensor": 1, "context": 1}
    assert describe_slow_axes(along_data) is None
    along_two = count_axis_slices(Parallelism(data=2, fsdp=4, context=2), 16, 4)
    message = describe_slow_axes(along_two)
    assert message is not None
    assert "2 slices lie along fsdp, so weights are gathered over the data centre's network (DCN)" in message
    assert message.endswith("Use a mesh whose data is a multiple of 4.")
    assert "tokens are exchanged" in (describe_slow_axes({"data": 1, "context": 2}) or "")


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("fsdp=8,context=4", Parallelism(fsdp=8, context=4)),
        ("data=2,context=-1", Parallelism(data=2, context=-1)),
        ("fsdp=-1", Parallelism(data=1, fsdp=-1)),
        ("", Parallelism()),
        ("context=4,context_attention=ring", Parallelism(context=4, context_attention="ring")),
    ],
)
def test_a_mesh_is_read_from_the_command_line(text, config):
    assert parse_parallelism(text) == config


@pytest.mark.parametrize("text", ["pipeline=2", "data=two", "data=--2", "data"])
def test_a_mesh_with_unknown_axes_or_sizes_is_refused_on_the_command_line(text):
    with pytest.raises(UserError, match=rf"--parallel {text} is invalid: .* Use data=1,fsdp=1,tensor=1,context=1"):
        parse_parallelism(text)


def test_sizes_of_the_command_line_leave_the_attention_of_the_config():
    ring = Parallelism(data=1, fsdp=8, context_attention="ring", slices=Slices(fsdp=2))
    assert parse_parallelism("context=4", ring) == Parallelism(context=4, context_attention="ring")
    assert parse_parallelism("context=4,context_attention=ulysses", ring) == Parallelism(context=4)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (Parallelism(data=1, fsdp=2, context=4), "fsdp=2,context=4"),
        (Parallelism(data=1, context=4, context_attention="ring"), "context=4,context_attention=ring"),
        (Parallelism(data=1, context_attention="ring"), "data=1"),
    ],
)
def test_a_mesh_is_written_as_the_command_line_takes_it(config, text):
    assert format_parallelism(config) == text
    devices = math.prod(getattr(config, name) for name in AXES)
    assert make_abstract_mesh(parse_parallelism(text), devices) == make_abstract_mesh(config, devices)
