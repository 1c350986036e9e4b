import gc
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.core.platform.provenance import get_code_version
from dit_video.training.checkpoint import CheckpointPolicy, Checkpoints
from support.devices import HANG, PROGRAMS, check_on_eight_devices

ROOT = Path(__file__).parents[2]

DAMAGE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def collected():
    """Collect the futures that orbax leaves behind after reading a damaged checkpoint, which complain then."""
    yield
    gc.collect()


@jax.tree_util.register_dataclass
@dataclass
class State:
    step: Any
    params: Any
    opt_state: Any
    extra: Any


def example(seed: int = 0, width: int = 5) -> State:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "blocks": {"up": {"kernel": jax.random.normal(keys[0], (2, 3, width))}},
        "list": [jnp.arange(3, dtype=jnp.int32), jax.random.normal(keys[1], (4,), jnp.bfloat16)],
    }
    moving = {"kernel": params["blocks"]["up"]["kernel"]}
    return State(
        step=jnp.asarray(seed, jnp.int32),
        params=params,
        opt_state=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(moving),
        extra={"counts": jax.random.bits(keys[2], (7,), jnp.uint32), "used": jnp.asarray([True, False]), "empty": {}},
    )


def like(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def saved(folder: Path, steps: tuple[int, ...], **changes: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=CheckpointPolicy(newest=len(steps)))
    for step in steps:
        meta = {"at": step, "config": {"backbone": {"width": 5}, "steps": 4, "name": "a"}}
        checkpoints.save(step, example(step, **changes), meta)
    checkpoints.wait()
    return checkpoints


def test_round_trip_is_bit_exact_and_keeps_the_structure(tmp_path):
    state = example(3)
    checkpoints = Checkpoints(tmp_path)
    meta = {"plan": "a1", "nested": {"list": [1, 2.5, None, "é"]}}
    checkpoints.save(3, state, meta)
    for reader in (checkpoints, Checkpoints(tmp_path)):
        restored, result = reader.restore(like(state))
        assert_same(restored, state)
        assert isinstance(restored.opt_state[1][0], optax.ScaleByAdamState)
        assert result == meta


def test_special_values_survive(tmp_path):
    bits = np.asarray([0x7F800000, 0x7FC00001, 0x80000000, 1, 0xFF812345], np.uint32)
    state = {"x": jnp.asarray(bits.view(np.float32)), "zero": jnp.zeros((0, 3))}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    restored, _ = checkpoints.restore(like(state))
    np.testing.assert_array_equal(np.asarray(restored["x"]).view(np.uint32), bits)


def test_a_state_may_be_donated_at_once(tmp_path):
    state = {"x": jnp.arange(2_000_000, dtype=jnp.float32), "step": jnp.asarray(0, jnp.int32)}
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = step(state)
    want = np.array(state["x"])
    shapes = like(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    for _ in range(5):
        state = step(state)
    jax.block_until_ready(state)
    restored, _ = checkpoints.restore(shapes)
    np.testing.assert_array_equal(restored["x"], want)
    assert int(restored["step"]) == 1


def test_only_the_newest_checkpoints_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=CheckpointPolicy(newest=2))
    assert checkpoints.latest() is None
    assert not (tmp_path / "run").exists()
    for step in (5, 10, 15):
        checkpoints.save(step, example(step), {})
    assert checkpoints.latest() == 15
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == 15
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["10", "15"]
    assert int(checkpoints.restore(like(example()), step=10)[0].step) == 10


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        (CheckpointPolicy(newest=1), {6}),
        (CheckpointPolicy(newest=1, every=2), {2, 4, 6}),
        (CheckpointPolicy(newest=1, best=2), {3, 5, 6}),
        (CheckpointPolicy(newest=1, best=1, better="higher"), {1, 6}),
        (CheckpointPolicy(newest=2, best=1, metric="validation"), {2, 5, 6}),
    ],
)
def test_each_rule_keeps_its_checkpoints(tmp_path, keep, stay):
    """This includes checkpoints of another process, and metrics that are missing or not numbers."""
    losses = {1: 9.0, 2: 5.0, 3: 1.0, 4: math.nan, 5: 2.0, 6: 7.0}
    for half in ((1, 2, 3), (4, 5, 6)):
        checkpoints = Checkpoints(tmp_path, keep=keep)
        for step in half:
            metrics = {"loss": losses[step], **({"validation": 3.0} if step == 2 else {})}
            checkpoints.save(step, {"x": jnp.ones(2)}, {}, metrics=metrics)
        checkpoints.wait()
    assert {int(path.name) for path in tmp_path.iterdir()} == stay


def test_invalid_checkpoint_policies_are_refused():
    with pytest.raises(UserError, match=r"newest=0 is invalid: it must be at least 1"):
        CheckpointPolicy(newest=0)
    with pytest.raises(UserError, match=r"every=0 is invalid: it must be at least 1"):
        CheckpointPolicy(every=0)


def test_a_checkpoint_says_what_made_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.ones(2)}, {"plan": "a"}, metrics={"loss": 2.0})
    checkpoints.wait()
    document = Checkpoints(tmp_path).read_document(1)
    assert document["metrics"] == {"loss": 2.0}
    assert document["meta"] == {"plan": "a"}
    assert document["code"]["jax"] == jax.__version__
    assert document["code"] == get_code_version()
    assert len(document["code"]["sources"]) == 16


def test_a_step_is_not_saved_over_its_future(tmp_path):
    saved(tmp_path, (5, 10))
    for step in (7, 10):
        with pytest.raises(UserError, match=rf"cannot save step {step} to .* Continue from step 10"):
            Checkpoints(tmp_path).save(step, example(), {})
    assert Checkpoints(tmp_path).latest() == 10
    with pytest.raises(TypeError):
        Checkpoints(tmp_path).save(11, example(), {"path": Path()})


def test_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(MissingError, match=r"no checkpoint in .* Train first"):
        Checkpoints(tmp_path / "none").restore(like(example()))
    saved(tmp_path, (5, 10))
    with pytest.raises(MissingError, match=r"no checkpoint of step 7 in .* steps: 5, 10"):
        Checkpoints(tmp_path).restore(like(example()), step=7)


def test_another_config_is_named_by_its_first_difference(tmp_path):
    state = example()
    checkpoints = saved(tmp_path, (1,))
    with pytest.raises(
        UserError,
        match=r"another config: params/blocks/up/kernel is float32\[2, 3, 5\] there and float32\[2, 3, 6\] here "
        r"\(and 2 more differences\)",
    ):
        checkpoints.restore(like(example(width=6)))
    lacking = State(state.step, {**state.params, "new": jnp.ones(2)}, state.opt_state, state.extra)
    mine = {"backbone": {"width": 6}, "steps": 4, "name": "b"}
    with pytest.raises(UserError, match=r"differences\); config: backbone.width is 5 there and 6 here, name is"):
        checkpoints.restore(like(example(width=6)), config=mine)
    with pytest.raises(UserError, match=r"it lacks params/new\. Use"):
        checkpoints.restore(like(lacking))
    with pytest.raises(UserError, match="it has extra/counts, which this run does not"):
        checkpoints.restore(like(State(state.step, state.params, state.opt_state, {})))
    cast = State(state.step.astype(jnp.uint32), state.params, state.opt_state, state.extra)
    with pytest.raises(UserError, match=r"step is int32\[\] there and uint32\[\] here"):
        checkpoints.restore(like(cast))


@pytest.mark.parametrize("number", [1, 99])
def test_another_format_is_refused(tmp_path, number):
    saved(tmp_path, (1,))
    path = tmp_path / "1" / "meta" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": number}))
    with pytest.raises(UserError, match=f"checkpoint format {number}, but this version reads 2. Use the version that"):
        Checkpoints(tmp_path).restore(like(example()))


@pytest.mark.parametrize("value", [1.0, 2.0, -0.5])
def test_zeros_in_place_of_equal_values_are_noticed(tmp_path, value):
    """Such as scales of a norm that are 1: their bits end with zeros, which a weighted sum drops."""
    state = {"scale": jnp.full((4096,), value)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.save(2, {"scale": jnp.zeros((4096,))}, {})
    checkpoints.wait()
    documents = [Checkpoints(tmp_path).read_document(step) for step in (1, 2)]
    assert documents[0]["arrays"] != documents[1]["arrays"]


@pytest.mark.slow
@DAMAGE
@pytest.mark.filterwarnings("ignore:checkpoint 2")
def test_every_damage_is_noticed_and_passed_over(tmp_path, collected):
    """Each file of the newest checkpoint in turn is removed or cut in half; the restored state is exact."""
    good = tmp_path / "good"
    saved(good, (1, 2))
    passed = 0
    for path in files(good / "2"):
        for half in (False, True):
            folder = tmp_path / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(good, folder)
            broken = folder / path.relative_to(good)
            data = broken.read_bytes()
            broken.write_bytes(data[: len(data) // 2]) if half else broken.unlink()
            checkpoints = Checkpoints(folder)
            try:
                restored, meta = checkpoints.restore(like(example()))
            except UserError as error:
                pytest.fail(f"{path}: {error}")
            assert_same(restored, example(meta["at"]))
            assert checkpoints.latest() == meta["at"]
            passed += meta["at"] == 1
    assert passed >= 6


@DAMAGE
def test_a_flipped_bit_is_noticed(tmp_path, collected):
    state = {"x": jax.random.normal(jax.random.key(0), (100_000,))}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    largest = max(files(tmp_path / "1"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(UserError, match=r"cannot read any checkpoint in "):
        Checkpoints(tmp_path).restore(like(state))


@DAMAGE
def test_training_goes_on_from_the_newest_good_one(tmp_path, collected):
    saved(tmp_path, (1, 2))
    (tmp_path / "2" / "state" / "manifest.ocdbt").unlink()
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 2
    with pytest.raises(UserError, match=r"cannot read step 2 in "):
        checkpoints.restore(like(example()), step=2)
    with pytest.warns(UserWarning, match=r"checkpoint 2 in .* cannot be read .*; continuing from step 1"):
        state, meta = checkpoints.restore(like(example()))
    assert_same(state, example(1))
    assert meta["at"] == 1
    assert checkpoints.latest() == 1
    checkpoints.save(2, example(2), {"at": 2})
    checkpoints.wait()
    assert_same(Checkpoints(tmp_path).restore(like(example()), step=2)[0], example(2))
    names = ["1", "2", "2.unreadable"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert Checkpoints(tmp_path).list_steps() == {1, 2}
    (tmp_path / "2" / "state" / "manifest.ocdbt").unlink()
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="continuing from step 1"):
        checkpoints.restore(like(example()))
    checkpoints.save(2, example(2), {"at": 2})
    checkpoints.wait()
    assert checkpoints.list_steps() == {1, 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "2.unreadable-2"]


def test_saving_and_restoring_print_nothing(tmp_path, capfd, caplog):
    with caplog.at_level(logging.INFO):
        for step in (1, 2):  # one by one, because Orbax logs waits of a second
            saved(tmp_path, (step,))
        Checkpoints(tmp_path).restore(like(example()))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert [record.message for record in caplog.records if record.name == "absl"] == []


@pytest.mark.slow  # it compares with the clock
def test_a_small_state_is_saved_soon(tmp_path):
    state = {str(index): jax.random.normal(jax.random.key(index), (256, 1024)) for index in range(40)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    began = time.perf_counter()
    checkpoints.save(2, state, {})
    checkpoints.wait()
    assert time.perf_counter() - began < 20  # 0.3 s alone on two cores; the machine may be busy


def test_a_checkpoint_moves_to_another_mesh(tmp_path):
    """One device saves, eight read and save, one reads; the digest is the same everywhere."""
    state = {"kernel": jax.random.normal(jax.random.key(0), (16, 64)), "count": jnp.asarray(3, jnp.int32)}
    one = Checkpoints(tmp_path / "one")
    one.save(1, state, {})
    one.wait()
    check_on_eight_devices("checkpoint_on_eight_devices.py", str(tmp_path))
    restored, _ = Checkpoints(tmp_path / "eight").restore(like(state))
    assert_same(restored, state)


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoints(tmp_path):
    """The system refuses files beyond a size in the writing thread, as it does on a full disk."""
    process = subprocess.run(
        [sys.executable, "-P", str(PROGRAMS / "checkpoint_on_full_disk.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert process.returncode == 0, process.stderr
    assert f"error: cannot write the checkpoint of step 2 to {tmp_path} (" in process.stdout
    assert "Earlier ones are intact" in process.stdout
    assert "orbax/checkpoint" not in process.stderr, "tracebacks of libraries bury the line"
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 1
    want = jnp.asarray(np.random.default_rng(0).normal(size=200_000))
    restored, _ = checkpoints.restore(like({"x": want}))
    assert_same(restored, {"x": want})
    checkpoints.save(2, {"x": want}, {})
    checkpoints.wait()
    assert Checkpoints(tmp_path).latest() == 2


def test_folders_that_cannot_be_written_are_reported(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    message = r"cannot write the checkpoint of step 1 to .*file/run \(NotADirectoryError: .* Earlier ones are intact"
    with pytest.raises(UserError, match=message):
        Checkpoints(tmp_path / "file" / "run").save(1, {"x": jnp.ones(2)}, {})

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)  # tests may run as root, who can write anywhere
    with pytest.raises(UserError, match="Read-only file system"):
        Checkpoints(tmp_path / "run").save(1, {"x": jnp.ones(2)}, {})


def test_an_address_without_an_installed_filesystem_is_refused():
    with pytest.raises(UserError, match=r"cannot open nowhere://bucket/run \(.* Install the package"):
        Checkpoints("nowhere://bucket/run")
