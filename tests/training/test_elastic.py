"""A run that continues with other devices, another mesh or other hosts has the same losses."""

import pytest

from support.devices import check_on_eight_devices, run_together

pytestmark = pytest.mark.slow


def test_one_two_four_and_eight_devices_continue_with_the_same_losses(tmp_path):
    check_on_eight_devices("elastic_training.py", "device counts", str(tmp_path))


@pytest.mark.nightly
def test_a_state_that_context_shares_or_not_continues_with_the_same_losses(tmp_path):
    check_on_eight_devices("elastic_training.py", "context", str(tmp_path))


def test_one_host_two_hosts_and_one_continue_with_the_same_losses(tmp_path):
    check_on_eight_devices("elastic_training.py", "start", str(tmp_path))
    outputs = run_together("elastic_training_on_two_hosts.py", str(tmp_path), devices=4)
    assert all("done" in output for output in outputs)
    check_on_eight_devices("elastic_training.py", "end", str(tmp_path))
