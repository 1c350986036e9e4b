"""Several processes restore the same checkpoint, whatever one of them meets."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dit_video.training.checkpoint import Checkpoints
from support.devices import PROGRAMS, find_free_port, make_environment, run_together

PROGRAM = "restore_in_two_processes.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    for output in run_together(PROGRAM, str(folder), "save"):
        assert "latest 2" in output
    return folder


def restore(folder: Path, fault: str) -> list[str]:
    """Return the last lines of both processes."""
    return [
        next(line for line in output.splitlines() if line.startswith(("restored", "error")))
        for output in run_together(PROGRAM, str(folder), fault)
    ]


@pytest.mark.parametrize("fault", ["chunk", "replica"])
def test_what_one_process_cannot_read_is_passed_over_by_all(saved, fault):
    assert restore(saved, fault) == ["restored 1 True latest 1"] * 2


def test_a_damaged_file_that_one_process_reads_is_passed_over_by_all(saved, tmp_path):
    """Orbax writes the part of each process into files of its own."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    parts = sorted((folder / "2" / "state" / "ocdbt.process_1").rglob("d/*"))
    assert parts
    for path in parts:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert restore(folder, "none") == ["restored 1 True latest 1"] * 2


def test_all_save_again_what_one_could_not_read_and_the_damaged_one_is_kept_under_another_name(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    assert restore(folder, "replaced") == ["restored 1 True latest 3"] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["2", "2.unreadable", "3"]


@pytest.mark.parametrize("fault", ["none", "once", "unseen"])
def test_a_fault_that_passes_changes_nothing(saved, fault):
    assert restore(saved, fault) == ["restored 2 True latest 2"] * 2


def test_storage_that_does_not_answer_one_process_ends_all_with_the_code_that_asks_for_another_start(saved):
    for line in restore(saved, "transient"):
        assert line.startswith(f"error TransientError 75 cannot read the checkpoint of step 2 in {saved} now (")
        assert re.search(r"UNAVAILABLE: the service does not answer\)", line)


def test_denied_access_of_one_process_is_no_damage(saved):
    for line in restore(saved, "denied"):
        assert line.startswith(f"error UserError 2 cannot read the checkpoint of step 2 in {saved} (")


def test_processes_that_do_different_things_do_not_mix_their_results(saved):
    for line in restore(saved, "confused"):
        assert line == (
            "error the processes of the run do different things at the same time: list checkpoints, read checkpoint 2"
        )


def test_the_first_process_lists_the_checkpoints_however_jax_numbers_the_processes(saved):
    assert restore(saved, "numbered") == ["restored nothing, latest 2"] * 2


def test_a_process_that_cannot_save_ends_all_with_the_code_that_asks_for_another_start(tmp_path):
    """It need not wait for the next save, and none of the earlier checkpoints is lost."""
    command = [sys.executable, "-P", str(PROGRAMS / "save_in_two_processes.py"), str(tmp_path)]
    environment = make_environment(1) | {"COORDINATOR_ADDRESS": f"127.0.0.1:{find_free_port()}", "NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [75, 75], outputs
    message = f"error: cannot write the checkpoint of step 2 to {tmp_path} ("
    assert f"{message}IncompleteSaveError: another process could not write its part" in outputs[0]
    assert f"{message}ValueError: UNAVAILABLE" in outputs[1]
    assert all("saving" in output and "not noticed" not in output for output in outputs)
    assert Checkpoints(tmp_path).latest() == 1
