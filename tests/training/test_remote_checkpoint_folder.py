"""Folder of checkpoints in a bucket, which has no empty folders."""

import jax.numpy as jnp
import pytest

from dit_video.core.storage import to_storage_path
from dit_video.training.checkpoint import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]  # in CI, that stage has gcsfs

PREFIX = "runs/new/checkpoints/"


def test_a_folder_exists_while_the_remains_of_an_interrupted_first_save_are_removed(gcs):
    """Orbax asks in each process whether it does; those that got different answers would wait for ever."""
    folder = f"gs://bucket/{PREFIX}"
    (to_storage_path(folder) / "5" / "state" / "part").write_bytes(b"half")
    was_there = []

    def observe(_method, _path):
        was_there.append(bool(gcs.list_names(PREFIX)))
        return 0

    gcs.fail = observe
    checkpoints = Checkpoints(folder)
    checkpoints.save(6, {"x": jnp.arange(3.0)}, {})
    checkpoints.wait()
    assert gcs.list_names(f"{PREFIX}5/") == []
    assert all(was_there)
    reopened = Checkpoints(folder)
    assert reopened.list_steps() == {6}
    state, _ = reopened.restore({"x": jnp.zeros(3)})
    assert state["x"].tolist() == [0.0, 1.0, 2.0]
