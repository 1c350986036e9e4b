"""Transfers between slices in the text of TPU programs, in the forms that libtpu prints."""

import pytest

from dit_video.planning import read_program

MESH = {"data": 2, "fsdp": 4, "tensor": 1, "context": 2}
SLICES = {"data": 2, "fsdp": 2, "tensor": 1, "context": 1}
"""Four slices of four devices, 0 and 1 along fsdp, 0 and 2 along data."""


def make_module(attributes: str) -> str:
    done = "%done = (f32[64,32]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true"
    recv = "(f32[64,32]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true"
    handler = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
    return (
        "HloModule jit_step\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  %token = token[] after-all()\n"
        f"  %recv = {recv}, frontend_attributes={{{handler}{attributes}}}\n  {done}\n}}\n"
    )


@pytest.mark.parametrize(
    ("kind", "target", "expected", "axes", "moved"),
    [
        ("ALL_REDUCE", '"{1,2,3,4}x{0:3}"', "all-reduce", ("data", "fsdp"), 2 * 3 / 4 * 8192),
        ("ALL_GATHER", "{{100000,200000},{100001,200001}}", "all-gather", ("fsdp",), 8192 / 2),
        ("ALL_REDUCE", "{{100000,300000},{200001,400001}}", "all-reduce", ("data",), 8192),
        ("REDUCE_SCATTER", "{{100000,300000}}", "reduce-scatter", ("data",), 8192),
        ("ALL_TO_ALL", "{{100000,100001,200000,200001}}", "all-to-all", ("fsdp",), 8192 / 2),
        ("ONE_TO_ONE", "{{100002->200000},{200002->100000}}", "collective-permute", ("fsdp",), 8192),
    ],
)
def test_transfers_between_slices_are_read_with_kind_axes_and_bytes(kind, target, expected, axes, moved):
    attributes = f",_xla_megascale_target={target},_xla_megascale_transfer_type={kind!r}".replace("'", '"')
    program = read_program(make_module(attributes), MESH, slices=SLICES)
    (transfer,) = program.slice_transfers.values()
    assert (transfer.kind, transfer.axes, transfer.bytes, transfer.count) == (expected, axes, moved, 1)
    assert transfer.between_slices
    assert not program.collectives


def test_other_receives_are_no_transfers_between_slices():
    assert not read_program(make_module(""), MESH, slices=SLICES).slice_transfers


def test_a_group_inside_a_slice_is_that_of_the_slices_own_mesh():
    """Each slice has a program of its own four devices, 2 along fsdp and 2 along context."""
    gather = "%c = f32[8]{0} all-gather(%p), replica_groups={{0,2},{1,3}}, dimensions={0}"
    text = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[64,32]{{1,0}} parameter(0)\n  {gather}\n}}\n"
    (part,) = read_program(text, MESH, slices=SLICES).collectives.values()
    assert part.axes == ("fsdp",)
