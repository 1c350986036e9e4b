import pickle
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dit_video import weights
from dit_video.core.errors import MissingError, UserError


def example() -> dict:
    random = np.random.default_rng(0)
    return {
        "blocks": {
            "up": {"kernel": jnp.asarray(random.normal(size=(2, 3, 5)), jnp.float32)},
            "half": random.normal(size=(4, 3)).astype(ml_dtypes.bfloat16),
        },
        "step": jnp.asarray(7, jnp.int32),
        "ids": np.arange(5, dtype=np.uint32) + 2**31,
        "mask": np.asarray([True, False, True]),
        "empty": np.zeros((0, 3), np.float32),
    }


def assert_same(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip_is_bit_exact(tmp_path):
    weights.save(tmp_path / "w.safetensors", example(), metadata={"z": "1", "a": "é"})
    assert_same(weights.load(tmp_path / "w.safetensors", dtype=None), example())
    assert weights.load_metadata(tmp_path / "w.safetensors") == {"z": "1", "a": "é"}


def test_special_values_of_bfloat16_survive(tmp_path):
    bits = np.asarray([0x7F80, 0xFF80, 0x7FC1, 0x0001, 0x8000, 0x3F80], np.uint16)
    weights.save(tmp_path / "w.safetensors", {"x": bits.view(ml_dtypes.bfloat16)})
    read = weights.load(tmp_path / "w.safetensors", dtype=None)["x"]
    np.testing.assert_array_equal(read.view(np.uint16), bits)
    assert weights.load(tmp_path / "w.safetensors")["x"].dtype == np.float32


def test_the_library_reads_the_file_and_the_other_way_round(tmp_path):
    tensors = {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.asarray(3, np.int64)}
    weights.save(tmp_path / "ours.safetensors", {"a": {"b": tensors["a/b"]}, "c": tensors["c"]})
    theirs = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    for name, array in tensors.items():
        np.testing.assert_array_equal(theirs[name], array)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors")
    assert_same(weights.load(tmp_path / "theirs.safetensors"), {"a": {"b": tensors["a/b"]}, "c": tensors["c"]})


def test_arrays_that_are_not_contiguous_are_written_in_their_order(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    weights.save(tmp_path / "w.safetensors", {"x": array.T, "y": array[:, ::2]})
    read = weights.load(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(read["x"], array.T)
    np.testing.assert_array_equal(read["y"], array[:, ::2])


def test_same_content_gives_the_same_file(tmp_path):
    tree = example()
    backwards = dict(reversed(tree.items()))
    weights.save(tmp_path / "1.safetensors", tree, metadata={"b": "1", "a": "2", "c": "3"})
    weights.save(tmp_path / "2.safetensors", backwards, metadata={"c": "3", "a": "2", "b": "1"})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_cast_takes_floating_arrays_only(tmp_path):
    weights.save(tmp_path / "w.safetensors", example(), dtype=jnp.bfloat16)
    read = weights.load(tmp_path / "w.safetensors", dtype=None)
    assert read["blocks"]["up"]["kernel"].dtype == ml_dtypes.bfloat16
    assert (read["step"].dtype, read["ids"].dtype, read["mask"].dtype) == (np.int32, np.uint32, np.bool_)
    rounded = np.asarray(example()["blocks"]["up"]["kernel"].astype(jnp.bfloat16).astype(jnp.float32))
    again = weights.load(tmp_path / "w.safetensors")["blocks"]["up"]["kernel"]
    assert again.dtype == np.float32
    np.testing.assert_array_equal(again, rounded)


def test_keys_with_a_slash_are_refused_where_they_collide(tmp_path):
    with pytest.raises(ValueError, match="the same name"):
        weights.save(tmp_path / "w.safetensors", {"a/b": np.ones(1), "a": {"b": np.ones(1)}})
    with pytest.raises(ValueError, match="dtype complex64"):
        weights.save(tmp_path / "w.safetensors", {"a": np.ones(1, np.complex64)})
    assert list(tmp_path.iterdir()) == []


def test_the_like_argument_gives_the_structure(tmp_path):
    tree = {"blocks": [{"k": np.ones(2, np.float32)}, {"k": np.zeros(2, np.float32)}]}
    weights.save(tmp_path / "w.safetensors", tree)
    read = weights.load(tmp_path / "w.safetensors", like=jax.eval_shape(lambda: tree))
    assert_same(read, tree)


def test_one_error_names_all_kinds_of_difference(tmp_path):
    tree = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32), "keep": np.ones(1, np.float32)}
    tree |= {f"extra{index:02}": np.ones(1, np.float32) for index in range(12)}
    weights.save(tmp_path / "w.safetensors", tree)
    like = {
        name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in {"a": (3, 2), "c": (1,), "keep": (1,)}.items()
    }
    with pytest.raises(UserError) as caught:
        weights.load(tmp_path / "w.safetensors", like=like)
    message = str(caught.value)
    assert "1 missing (c)" in message
    assert "1 misshapen (a [2, 3] instead of [3, 2])" in message
    assert "13 unexpected (b, extra00," in message
    assert "… 3 more)" in message
    assert "\n" not in message


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".safetensors"])
def test_pickles_are_refused_with_the_conversion(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps({"x": np.ones(3)}))
    with pytest.raises(UserError, match=r"pickled file.*save_file\(torch.load\('model"):
        weights.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    with pytest.raises(UserError, match="pickled file"):
        weights.load_metadata(path)


def test_a_header_that_starts_as_a_pickle_does_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    for length in range(400, 800):
        weights.save(path, {"x": np.ones(1, np.float32)}, metadata={"fill": "." * length})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no header of 640 bytes")
    assert weights.load(path)["x"].tolist() == [1.0]


def test_truncated_and_corrupt_files_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    weights.save(path, example())
    data = path.read_bytes()
    for broken in (
        data[:-1],
        data[: len(data) // 2],
        data[:5],
        b"",
        data + b"x",
        b"\x10" + bytes(7) + b"not a header!!!!",
    ):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="not a complete safetensors file"):
            weights.load(path)
        with pytest.raises(UserError, match="not a complete safetensors file"):
            weights.load_metadata(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(MissingError, match="no such file"):
        weights.load(tmp_path / "none.safetensors")
    with pytest.raises(MissingError, match="no such file"):
        weights.load(tmp_path)


def test_an_existing_file_survives_a_failed_save(tmp_path):
    path = tmp_path / "w.safetensors"
    weights.save(path, {"x": np.ones(2, np.float32)})

    class Broken:
        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, *_args, **_kwargs):
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        weights.save(path, {"x": Broken()})
    assert weights.load(path)["x"].tolist() == [1.0, 1.0]
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
