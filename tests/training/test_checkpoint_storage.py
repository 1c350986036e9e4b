"""Checkpoints on storage that fails for a while, or for good."""

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dit_video.core.errors import TransientError, UserError
from dit_video.distributed.processes import main_process_first
from dit_video.training.checkpoint import Checkpoints
from support.devices import HANG, PROGRAMS, make_environment, wait_until

FINISHED = r"cannot write the checkpoint of step {} to .* Earlier ones are intact: run the same command"


@pytest.fixture(autouse=True)
def _retry_soon(monkeypatch):
    monkeypatch.setattr("dit_video.core.storage.RETRY_SECONDS", (0.0, 0.0))


@pytest.fixture
def faults(monkeypatch) -> list[int]:
    """Errors of the system that the next steps to finish a checkpoint meet, each once."""
    numbers: list[int] = []
    rename = os.rename

    def fail(source: Any, *arguments: Any, **keywords: Any) -> None:
        if numbers and "orbax-checkpoint-tmp" in str(source):
            number = numbers.pop(0)
            raise OSError(number, os.strerror(number))
        rename(source, *arguments, **keywords)

    monkeypatch.setattr("os.rename", fail)
    return numbers


def make_state(value: float) -> dict[str, jax.Array]:
    return {"x": jnp.full((1000,), value), "step": jnp.asarray(int(value), jnp.int32)}


def restore(folder: Path, step: int | None = None) -> float:
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state(0))
    state, _ = Checkpoints(folder).restore(like, step)
    (value,) = np.unique(state["x"])
    return float(value)


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_save_that_failed_is_written_again_while_its_state_exists(tmp_path, faults):
    checkpoints, state = Checkpoints(tmp_path), make_state(1)
    faults.append(errno.ESTALE)
    checkpoints.save(1, state, {"a": 1})
    checkpoints.wait()
    assert not faults
    assert restore(tmp_path) == 1
    assert list_names(tmp_path) == ["1"]


def test_a_save_that_failed_is_given_up_once_for_the_next_one(tmp_path, faults):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    faults.append(errno.EIO)
    checkpoints.save(2, make_state(2), {})
    wait_until(lambda: not faults)
    with pytest.warns(UserWarning, match=r"of step 2 .*\(OSError: .*\)\. .* saves step 3 instead"):
        checkpoints.save(3, make_state(3), {})
    checkpoints.wait()
    assert list_names(tmp_path) == ["1", "3"]
    for step in (4, 5):
        faults.append(errno.EIO)
        if step == 4:
            checkpoints.save(step, make_state(step), {})
        else:
            with pytest.warns(UserWarning, match="saves step 5 instead"):
                checkpoints.save(step, make_state(step), {})
        wait_until(lambda: not faults)
    with pytest.raises(TransientError, match=FINISHED.format(5)):
        checkpoints.save(6, make_state(6), {})
    assert restore(tmp_path) == 3


def test_a_state_that_was_donated_is_not_written_again(tmp_path, faults):
    checkpoints, state = Checkpoints(tmp_path), make_state(1)
    faults.append(errno.ETIMEDOUT)
    checkpoints.save(1, state, {})
    jax.tree.map(lambda array: array.delete(), state)  # as a step does that takes its memory
    with pytest.raises(TransientError, match=FINISHED.format(1)):
        checkpoints.wait()
    assert Checkpoints(tmp_path).latest() is None


@pytest.mark.parametrize(("number", "advice"), [(errno.ENOSPC, "free disk space"), (errno.EROFS, "write permission")])
def test_what_needs_a_person_is_not_tried_again(tmp_path, faults, number, advice):
    checkpoints = Checkpoints(tmp_path)
    faults.extend([number, number])
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(UserError, match=rf"step 1 .*{advice}") as result:
        checkpoints.wait()
    assert result.value.code == 2
    assert len(faults) == 1


FULL = (
    'RESOURCE_EXHAUSTED: Error writing "ema/0" in OCDBT database at local file "/run/8.orbax-checkpoint-tmp/state.'
    f'orbax-checkpoint-tmp/ocdbt.process_0/": Failed writing: "/run/8.orbax-checkpoint-tmp/d/{"0" * 32}": Failed to '
    "write 133937 bytes to file 7: No space left on device [os_error_code='28']"
)
"""Message of tensorstore."""


def test_a_full_disk_is_told_once_with_its_reason(tmp_path, monkeypatch, caplog):
    def fail(self: Any, step: int, **keywords: Any) -> bool:
        for message in (FULL, "another error"):  # as futures do that are freed
            logging.getLogger("asyncio").error("exception was never retrieved", exc_info=ValueError(message))
        raise ValueError(FULL)

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.raises(UserError, match=r"step 1 .* No space left on device \[os_error_code='28'\]\)\. Earlier"):
        Checkpoints(tmp_path).save(1, make_state(1), {})
    assert [str(record.exc_info[1]) for record in caplog.records if record.name == "asyncio"] == ["another error"]


def test_a_save_is_begun_again_if_the_storage_does_not_answer(tmp_path, monkeypatch):
    save, calls = ocp.CheckpointManager.save, []

    def fail(self: Any, step: int, **keywords: Any) -> bool:
        calls.append(step)
        if len(calls) < 3:
            raise ValueError("UNAVAILABLE: Error writing: [http_response_code='503']")
        return save(self, step, **keywords)

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    assert (restore(tmp_path), calls) == (1, [1, 1, 1])


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(errno.ESTALE, 75, marks=pytest.mark.slow), (errno.EDQUOT, 2)]
)
def test_a_script_that_cannot_save_ends_with_the_code_of_the_error(tmp_path, number, code):
    command = [sys.executable, "-P", str(PROGRAMS / "checkpoint_on_faulty_disk.py"), str(tmp_path), str(number)]
    done = subprocess.run(command, env=make_environment(1), capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot write the checkpoint of step 2 to {tmp_path} (")
    assert Checkpoints(tmp_path).latest() == 1


def fail_reads(monkeypatch, errors: list[Exception]) -> Callable[[], None]:
    """Let the next reads of arrays raise these errors."""
    read = ocp.StandardCheckpointHandler.restore

    def fail(*arguments: Any, **keywords: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return read(*arguments, **keywords)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)


def save_two(folder: Path) -> None:
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {})
    checkpoints.wait()


def test_storage_that_does_not_answer_is_no_damaged_checkpoint(tmp_path, monkeypatch):
    save_two(tmp_path)
    unavailable = ValueError("UNAVAILABLE: Error reading")
    fail_reads(monkeypatch, errors := [unavailable, TimeoutError("slow")])
    assert restore(tmp_path) == 2
    errors += [unavailable] * 3
    with pytest.raises(TransientError, match=r"read the checkpoint of step 2 in .* now \(ValueError: UNAVAILABLE"):
        restore(tmp_path)
    errors.append(PermissionError(13, "Permission denied"))
    with pytest.raises(UserError, match=r"cannot read .* step 2 .* Check the permissions") as result:
        restore(tmp_path)
    assert result.value.code == 2
    errors.append(ValueError("DATA_LOSS: the checksum does not match"))
    with pytest.warns(UserWarning, match="checkpoint 2 in .* cannot be read .*; continuing from step 1"):
        assert restore(tmp_path) == 1
    assert not errors


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EINVAL])
def test_trouble_of_the_system_is_no_damaged_checkpoint(tmp_path, monkeypatch, number):
    save_two(tmp_path)
    fail_reads(monkeypatch, [OSError(number, os.strerror(number)) for _ in range(3)])
    with pytest.raises(TransientError, match=rf"read the checkpoint of step 2 in .* now .*{os.strerror(number)}"):
        restore(tmp_path)
    assert list_names(tmp_path) == ["1", "2"]


@pytest.mark.parametrize("error", [TypeError("wrong"), AttributeError("wrong"), ImportError("wrong")])
def test_a_mistake_in_the_program_is_no_damaged_checkpoint(tmp_path, monkeypatch, error):
    save_two(tmp_path)
    fail_reads(monkeypatch, [error])
    with pytest.raises(type(error), match="wrong"):
        restore(tmp_path)


def test_what_was_unreadable_is_renamed_by_the_same_object_that_saved_it(tmp_path, monkeypatch):
    save_two(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, make_state(3), {})
    checkpoints.wait()
    fail_reads(monkeypatch, [ValueError("DATA_LOSS: the checksum does not match")])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state(0))
    with pytest.warns(UserWarning, match="checkpoint 3 in .* cannot be read .*; continuing from step 2"):
        checkpoints.restore(like)
    checkpoints.save(3, make_state(7), {})
    checkpoints.wait()
    assert checkpoints.list_steps() == {2, 3}
    assert list_names(tmp_path) == ["2", "3", "3.unreadable"]
    assert restore(tmp_path, 3) == 7


def test_a_folder_is_listed_once_until_something_is_saved(tmp_path, monkeypatch):
    save_two(tmp_path)
    looks, is_dir = [], Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path: looks.append(path) or is_dir(path))
    checkpoints = Checkpoints(tmp_path)
    assert [checkpoints.latest(), checkpoints.latest()] == [2, 2]
    assert looks.count(tmp_path) == 1
    checkpoints.save(3, make_state(3), {})
    assert checkpoints.latest() == 3


def test_what_needs_all_processes_is_refused_where_only_one_is(tmp_path):
    save_two(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    for call in (checkpoints.latest, checkpoints.list_steps, lambda: checkpoints.restore(make_state(0))):
        with main_process_first(), pytest.raises(RuntimeError, match="in a block of main_process_first"):
            call()
    assert checkpoints.latest() == 2


def test_a_device_without_memory_is_no_damaged_checkpoint(tmp_path, monkeypatch):
    save_two(tmp_path)
    fail_reads(monkeypatch, [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        restore(tmp_path)


def test_a_folder_that_cannot_be_listed_now_is_no_new_run(tmp_path, monkeypatch):
    save_two(tmp_path)

    def fail(*_: object) -> bool:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", fail)
        with pytest.raises(TransientError, match=r"cannot read the list of checkpoints in .* now"):
            Checkpoints(tmp_path).latest()
    assert Checkpoints(tmp_path).latest() == 2


def test_a_process_whose_folder_was_taken_over_saves_nothing(tmp_path):
    from dit_video.training.folder_lock import lock_folder

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with lock_folder(tmp_path):
        checkpoints.save(1, make_state(1), {})
        lease = tmp_path / ".lease-000001"
        content = lease.read_text()
        lease.write_text("another process has made it")
        with pytest.raises(TransientError, match=r"is lost: another run has taken it over.* ends without writing"):
            checkpoints.save(2, make_state(2), {})
        lease.write_text(content)
    assert checkpoints.latest() == 1
