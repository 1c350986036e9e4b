"""Sampling on the devices of a mesh, compared with one device."""

import pytest

from support.devices import check_on_eight_devices

PROGRAM = "sampling_on_eight_devices.py"


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
def test_the_state_of_a_model_is_shared_as_the_rows_are():
    check_on_eight_devices(PROGRAM, "state")


@pytest.mark.slow
def test_open_weights_are_read_to_a_mesh_and_sampled_there():
    check_on_eight_devices(PROGRAM, "wan")


@pytest.mark.slow
def test_weights_are_put_on_the_devices_once_and_each_holds_its_share():
    check_on_eight_devices(PROGRAM, "weights")
