"""Files, random keys, trees, configs and pixels."""

import errno
import json
import runpy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core import config_json, files, pixels, registry, rng, trees
from dit_video.core.errors import MissingError, UserError
from dit_video.models.backbones.dit import DiTConfig
from dit_video.tokens import PackedShape

# --- files ----------------------------------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_atomic_file_appears_whole_in_a_new_folder(tmp_path):
    with files.atomic_path(tmp_path / "new" / "clip.mp4") as temporary:
        assert temporary.suffix == ".mp4"
        temporary.write_bytes(b"half")
        assert names(tmp_path / "new") == [temporary.name]
        temporary.write_bytes(b"whole")
    assert names(tmp_path / "new") == ["clip.mp4"]
    assert (tmp_path / "new" / "clip.mp4").read_bytes() == b"whole"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.json"
    files.write_text(path, "old")

    def fail():
        with files.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_the_error_of_a_full_disk_names_the_file(tmp_path):
    def fail():
        with files.atomic_path(tmp_path / "clip.mp4"):
            raise OSError(errno.ENOSPC, "No space left on device")  # as a write does, without a name

    with pytest.raises(OSError, match=r"No space left on device: '.*/clip\.mp4'$"):
        fail()


@pytest.mark.parametrize("check", [files.check_writable, files.check_writable_folder])
def test_a_full_disk_is_known_before_the_work(tmp_path, monkeypatch, check):
    path = tmp_path / "clip.mp4"
    for free in (0, 1000):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(total=10**6, free=free))
        with pytest.raises(
            UserError, match=rf"clip\.mp4 cannot be written: .* {free} bytes are free\. Free disk space"
        ):
            check(path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=0, free=0))  # of a file system of services
    check(path)
    assert names(tmp_path) == []


def test_a_written_folder_replaces_the_old_one(tmp_path):
    for content in ("old", "new"):
        with files.atomic_path(tmp_path / "run") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["new"]


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").touch()

    def fail():
        with files.atomic_path(tmp_path / "run") as temporary:
            temporary.mkdir()
            (temporary / "half").touch()
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["old"]


def test_json_is_read_as_it_was_written(tmp_path):
    value = {"prompt": "ein roter Kreis →", "frames": [1, 9], "share": 0.25, "none": None}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value


def test_missing_or_broken_json_is_refused(tmp_path):
    with pytest.raises(MissingError, match=r"no such file: .*a\.json"):
        files.read_json(tmp_path / "a.json")
    for content in (b'{"half": ', b"\xff\xfe"):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UserError, match="is not valid JSON"):
            files.read_json(tmp_path / "a.json")


# --- rng ------------------------------------------------------------------------------------------------------------


def bits(keys):
    return np.asarray(jax.random.key_data(keys))


def test_keys_differ_by_seed_and_purpose_and_nothing_else():
    assert (bits(rng.key(0, "noise")) == bits(rng.key(0, "noise"))).all()
    assert (bits(rng.key(0, "noise")) != bits(rng.key(0, "time"))).any()
    assert (bits(rng.key(0, "noise")) != bits(rng.key(1, "noise"))).any()


def test_the_key_of_an_example_does_not_depend_on_its_place():
    purpose = rng.key(0, "noise")
    examples = jnp.asarray([[3, 1, 4], [1, 5, 9]], jnp.uint32)
    keys = rng.example_keys(purpose, 7, examples)
    assert keys.shape == (2, 3)
    assert (bits(keys[0, 1]) == bits(keys[1, 0])).all()
    np.testing.assert_array_equal(bits(rng.example_keys(purpose, 7, examples.T)), bits(keys.T))
    alone = rng.example_keys(purpose, 7, jnp.asarray([9], jnp.uint32))
    np.testing.assert_array_equal(bits(alone[0]), bits(keys[1, 2]))


def test_keys_are_distinct_over_examples_and_steps():
    examples = jnp.arange(200, dtype=jnp.uint32)
    keys = [bits(rng.example_keys(rng.key(0, "noise"), step, examples)) for step in range(3)]
    assert len({tuple(key) for key in np.concatenate(keys)}) == 600


def test_a_traced_step_gives_the_same_keys():
    purpose, examples = rng.key(0, "noise"), jnp.arange(4, dtype=jnp.uint32)
    jitted = jax.jit(lambda step: jax.random.key_data(rng.example_keys(purpose, step, examples)))
    np.testing.assert_array_equal(jitted(jnp.asarray(5)), bits(rng.example_keys(purpose, 5, examples)))


def test_the_host_generator_is_a_function_of_its_arguments():
    draw = lambda *arguments: rng.make_generator(*arguments).integers(0, 2**62, 4).tolist()  # noqa: E731
    assert draw(0, "plan", 1) == draw(0, "plan", 1)
    assert len({tuple(draw(*a)) for a in [(0, "plan"), (0, "plan", 1), (0, "plan", 1, 2), (1, "plan"), (0, "a")]}) == 5


# --- tree -----------------------------------------------------------------------------------------------------------


def test_a_flattened_tree_can_be_restored():
    value = {"blocks": {"attention": {"kernel": np.ones((2, 3))}, "scale": np.ones(4)}, "embed": np.zeros(())}
    leaves = trees.flatten(value)
    assert list(leaves) == ["blocks/attention/kernel", "blocks/scale", "embed"]
    back = trees.unflatten(leaves)
    assert jax.tree.structure(back) == jax.tree.structure(value)
    assert back["blocks"]["scale"] is value["blocks"]["scale"]
    assert trees.count_values(value) == 11


def test_map_with_path():
    value = {"a": {"b": 1}, "c": 2}
    assert trees.map_with_path(lambda path, leaf: f"{path}={leaf}", value) == {"a": {"b": "a/b=1"}, "c": "c=2"}


# --- configs --------------------------------------------------------------------------------------------------------


def test_a_config_is_the_same_after_json():
    value = {
        "row": PackedShape(tokens=1, text=2, segments=3),
        "sizes": ((17, 32, 48), (1, 32, 32)),
        "name": "x",
        "no": None,
    }
    written = json.loads(json.dumps(config_json.to_json(value)))
    assert written["row"]["type"] == "dit_video.tokens:PackedShape"
    assert config_json.from_json(written) == value


@dataclass(frozen=True, kw_only=True)
class Foreign:
    width: int = 1


def test_values_that_are_no_config_are_not_written():
    with pytest.raises(TypeError, match="outside dit_video"):
        config_json.to_json(Foreign())
    for value in ([1], {1}, np.ones(2), len):
        with pytest.raises(TypeError, match="cannot hold"):
            config_json.to_json(value)


@pytest.mark.parametrize("module", ["__main__", "<run_path>"])
def test_a_class_of_a_file_that_is_run_is_not_written_for_other_processes(tmp_path, module):
    script = tmp_path / "script.py"
    script.write_text(
        "from dataclasses import dataclass\n"
        "from dit_video.core.registry import register\n"
        "@register\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Width:\n"
        "    width: int = 1\n"
    )
    value = {"widths": (runpy.run_path(str(script), run_name=module)["Width"](),)}
    assert config_json.to_json(value) == {"widths": [{"type": f"{module}:Width", "width": 1}]}
    with pytest.raises(UserError, match=f"'{module}:Width' is invalid: .* Use a module that can be imported"):
        config_json.to_portable_json(value)


def test_a_class_of_a_function_is_not_written_for_other_processes():
    @registry.register
    @dataclass(frozen=True, kw_only=True)
    class Width:
        width: int = 1

    with pytest.raises(UserError, match=r"<locals>\.Width' is invalid: .* Use a module that can be imported"):
        config_json.to_portable_json(Width())


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DiTConfig(channels=4, context_width=0, mlp=cast(Any, "relu")),
            "mlp='relu' of DiTConfig .* must be 'gelu' or .* Use mlp='gelu'",
        ),
        (
            lambda: DiTConfig(channels=4, context_width=0, width=cast(Any, 384.0)),
            "width=384.0 of DiTConfig is invalid: it must be of type int",
        ),
        (lambda: Foreign(), "outside dit_video; register it"),
    ],
)
def test_a_config_that_could_not_be_read_is_not_written_for_other_processes(make, message):
    with pytest.raises(UserError, match=message):
        config_json.to_portable_json(make())


SCALES = [{"type": "dit_video.diffusion:Guidance", "scales": scales} for scales in ({"a": 1, "b": 2}, {"b": 2, "a": 1})]


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ({"g": SCALES[0]}, {"g": SCALES[1]}, "g.scales is ['a', 'b'] there and ['b', 'a'] here"),
        ({"g": SCALES[0]}, {"g": SCALES[0]}, ""),
        ({"a": 1, "g": SCALES[0]}, {"g": SCALES[0], "a": 1}, ""),
        (SCALES[0], dict(reversed(SCALES[0].items())), ""),
    ],
)
def test_the_order_of_a_mapping_in_a_config_is_compared(old, new, difference):
    assert config_json.describe_difference(old, new) == difference


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"type": "os:system"}, "outside dit_video"),
        ({"type": "dit_videos.evil:Config"}, "outside dit_video"),
        ({"type": "dit_video.tokens.packing:Missing"}, "does not exist in this version"),
        ({"type": "dit_video.nowhere:Config"}, "does not exist in this version"),
        ({"type": "dit_video.tokens.packing:pack"}, "is not a dataclass"),
        ({"type": "dit_video.tokens.packing:PackedBatch"}, "is not a dataclass"),
        ({"type": "dit_video.core.files:os.system"}, "is not a dataclass"),
        ({"type": "dit_video.tokens.shapes:PackedShape", "tokens": 1, "text": 1}, "lacks the field segments"),
        (
            {"type": "dit_video.tokens.shapes:PackedShape", "tokens": 1, "text": 1, "segments": 1, "heads": 2},
            "has no field heads; use the version",
        ),
        (
            {"type": "dit_video.tokens.shapes:PackedShape", "tokens": "1", "text": 1, "segments": 1},
            "tokens='1' of .* must be of type int",
        ),
        (
            {"type": "dit_video.tokens.shapes:PackedShape", "tokens": True, "text": 1, "segments": 1},
            "must be of type int",
        ),
        (
            {"type": "dit_video.experiment:DataConfig", "max_pixels": 1, "max_frames": "x"},
            "of DataConfig is invalid",
        ),
        (
            {"type": "dit_video.experiment:DataConfig", "max_pixels": 1, "max_frames": 1, "held_out": [1]},
            "of DataConfig is invalid",
        ),
        (
            {"type": "dit_video.data.windows:WindowConfig", "size": [1, "a", 2], "batch": 1},
            "of WindowConfig is invalid",
        ),
        (
            {
                "type": "dit_video.models.backbones.dit:DiTConfig",
                "channels": 1,
                "context_width": 1,
                "absolute_position": 3,
            },
            "absolute",
        ),
        (
            {"type": "dit_video.training.optim.optimizer:Muon", "patterns": "blocks/"},
            "of Muon is invalid",
        ),
    ],
)
def test_a_config_that_cannot_be_rebuilt_is_refused(written, message):
    with pytest.raises(UserError, match=message):
        config_json.from_json({"inside": [written]})


# --- pixels ---------------------------------------------------------------------------------------------------------


def test_every_uint8_value_is_the_same_after_conversion_to_float_and_back():
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    floats = pixels.to_float(frames)
    assert floats.dtype == np.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    np.testing.assert_array_equal(pixels.to_uint8(floats), frames)


def test_pixels_out_of_range_are_clipped():
    values = np.array([[[-9, 0, 9]]], np.float32)
    assert pixels.to_uint8(values).tolist() == [[[0, 128, 255]]]


def test_pixels_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="1 of 3 pixel values are NaN"):
        pixels.to_uint8(np.array([[[0.0, np.nan, 1.0]]], np.float32))
