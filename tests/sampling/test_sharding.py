"""Sampling on the devices of a mesh, compared with one device."""

import pytest

from dit_video.diffusion import Guidance
from dit_video.distributed import MeshConfig
from dit_video.distributed.mesh import make_abstract_mesh
from dit_video.sampling.packing import RowMultiples, compute_row_multiples
from support.devices import check_on_eight_devices

PROGRAM = "sampling_on_eight_devices.py"


@pytest.mark.parametrize(
    ("sizes", "guidance", "multiples"),
    [
        ({"data": 2, "context": 4}, Guidance(scale=2.0), RowMultiples(1, 2)),
        ({"data": 8}, Guidance(scale=2.0), RowMultiples(4, 8)),
        ({"data": 2, "fsdp": 4}, Guidance(scale=2.0, image_scale=3.0), RowMultiples(8, 8)),
        ({"data": 8}, Guidance(scale=2.0, interval=(0.2, 0.8)), RowMultiples(8, 8)),
        ({"data": 8}, Guidance(scale=1.0), RowMultiples(8, 8)),
        ({"data": 1, "context": 8}, Guidance(scale=2.0), RowMultiples(1, 1)),
    ],
)
def test_rows_are_as_many_as_devices_share_all_that_is_evaluated(sizes, guidance, multiples):
    mesh = make_abstract_mesh(MeshConfig(**sizes), 8)
    assert compute_row_multiples(mesh, guidance, is_batched=True) == multiples
    assert compute_row_multiples(None, guidance, is_batched=True) == RowMultiples(1, 1)
    assert compute_row_multiples(mesh, guidance, is_batched=False).separate == sizes["data"] * sizes.get("fsdp", 1)


@pytest.mark.slow
def test_the_program_of_a_plan_is_run_and_a_mesh_that_does_not_fit_is_refused():
    check_on_eight_devices(PROGRAM, "plan", "mistakes")


@pytest.mark.slow
def test_eight_devices_make_the_latents_of_one():
    check_on_eight_devices(PROGRAM, "latents")


@pytest.mark.slow
def test_all_kinds_of_guidance_are_sampled_on_a_mesh():
    check_on_eight_devices(PROGRAM, "guidance")


@pytest.mark.slow
def test_open_weights_are_read_to_a_mesh_and_sampled_there():
    check_on_eight_devices(PROGRAM, "wan")


@pytest.mark.slow
def test_weights_are_put_on_the_devices_once_and_each_holds_its_share():
    check_on_eight_devices(PROGRAM, "weights")
