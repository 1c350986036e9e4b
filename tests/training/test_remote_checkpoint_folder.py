"""Folder of checkpoints in a bucket: it has no empty folders, and its errors are those of a service."""

import warnings
from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.storage import to_storage_path
from dit_video.training.checkpoint import Checkpoints
from support.marks import mark_nightly_except

pytestmark = pytest.mark.slow  # in CI, that stage has gcsfs

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


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "removed": lambda content: None,
    "empty": lambda content: b"",
    "cut after a byte": lambda content: content[:1],
    "cut in the middle": lambda content: content[: len(content) // 2],
    "cut before the last byte": lambda content: content[:-1],
    "another byte in the middle": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("kind", mark_nightly_except(["empty", "removed"], DAMAGES))
def test_any_damage_of_any_file_leads_to_the_checkpoint_before(gcs, kind):
    """A file without which all values are read does not matter."""
    prefix = f"runs/{kind.replace(' ', '-')}/checkpoints/"
    generator = np.random.default_rng(0)
    states = [{name: jnp.asarray(generator.random((64, 96), np.float32)) for name in "abc"} for _ in range(2)]
    checkpoints = Checkpoints(f"gs://bucket/{prefix}")
    for step, state in enumerate(states, start=1):
        checkpoints.save(step, state, {"step": step})
    checkpoints.wait()
    objects = dict(gcs.objects)
    passed_over = 0
    for name in gcs.list_names(f"{prefix}2/"):
        content = DAMAGES[kind](objects[name].content)
        gcs.objects = {**objects, name: replace(objects[name], content=content)}
        if content is None:
            del gcs.objects[name]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state, meta = Checkpoints(f"gs://bucket/{prefix}").restore(states[0])
        for path, array in states[meta["step"] - 1].items():
            np.testing.assert_array_equal(state[path], array, err_msg=name)
        if meta["step"] == 1:
            passed_over += 1
            assert any("continuing from step 1" in str(each.message) for each in caught), name
    assert passed_over >= 3
