"""Tensors of PyTorch's files, read without running anything of them."""

import collections
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dit_video.core.errors import MissingError, UserError
from dit_video.weights.feature_networks import load_i3d
from dit_video.weights.torch_files import convert_torch_file, read_torch_tensors
from support.torch_archives import ARCHIVE, OLDER_FORMAT, write_torch_file


class Trap:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def write_archive(path: Path, content: object) -> Path:
    return write_pickle(path, pickle.dumps(content, protocol=2))


def write_pickle(path: Path, content: bytes, *, values: bytes = bytes(8), method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("model/data.pkl", content)
        archive.writestr("model/data/0", values)
    return path


def pickle_tensor(*, shape: tuple[int, ...] = (2,), strides: tuple[int, ...] = (1,)) -> bytes:
    """Return the instructions of a tensor of float32, whose storage has the key 0."""
    sizes = b"".join(pickle.dumps(each, protocol=2)[2:-1] for each in (shape, strides))
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQK\x00"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + sizes + b"tR"


NAME = b"X\x01\x00\x00\x00w"
TWICE = b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(25)) + b"."
"""A list that holds a list twice, which holds a list twice, and so on 25 times."""
NESTED_TUPLE = b")" + b"\x85" * 10**5


@pytest.mark.parametrize("fixture", [OLDER_FORMAT, ARCHIVE], ids=["older", "archive"])
def test_reads_both_formats(tmp_path, fixture):
    tensors = read_torch_tensors(write_torch_file(tmp_path / "model.pt", fixture))
    assert list(tensors) == ["a.w"]
    np.testing.assert_array_equal(tensors["a.w"], np.arange(6, dtype=np.float32).reshape(2, 3).T)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_does_not_run_what_is_pickled(tmp_path, protocol):
    trap = tmp_path / "trap"
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps({"w": Trap(trap)}, protocol=protocol))
    with pytest.raises(UserError, match=r"(posix|nt)\.mkdir.*could run code"):
        read_torch_tensors(path)
    with pytest.raises(UserError, match="could run code"):
        read_torch_tensors(write_archive(path, [Trap(trap)]))
    assert not trap.exists()


@pytest.mark.parametrize("content", [Path("file"), collections.Counter("a"), print, 1j])
def test_other_objects_are_refused(tmp_path, content):
    with pytest.raises(UserError, match="neither a tensor nor a plain container"):
        read_torch_tensors(write_archive(tmp_path / "model.pt", {"w": content}))


def test_plain_containers_have_no_tensors(tmp_path):
    content = {"epoch": 3, "sizes": [1, (2.5, None)], "names": collections.OrderedDict(a=True)}
    assert read_torch_tensors(write_archive(tmp_path / "model.pt", content)) == {}


def test_containers_of_themselves_are_refused(tmp_path):
    content: list = []
    content.append(content)
    with pytest.raises(UserError, match="containers within 32 others"):
        read_torch_tensors(write_archive(tmp_path / "model.pt", content))


@pytest.mark.parametrize("fixture", [OLDER_FORMAT, ARCHIVE], ids=["older", "archive"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_parts_of_files_are_damaged(tmp_path, fixture, share):
    path = write_torch_file(tmp_path / "model.pt", fixture)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"damaged|invalid"):
        read_torch_tensors(path)


def test_a_file_that_is_missing_or_of_something_else_is_named(tmp_path):
    with pytest.raises(MissingError, match=r"model\.pt"):
        read_torch_tensors(tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes(b"weights")
    with pytest.raises(UserError, match="no file of PyTorch"):
        read_torch_tensors(tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes(pickle.dumps(7))
    with pytest.raises(UserError, match="none of PyTorch"):
        read_torch_tensors(tmp_path / "model.pt")


def test_a_pickle_of_instructions_is_a_tensor(tmp_path):
    content = b"\x80\x02}" + NAME + pickle_tensor(shape=(3, 2), strides=(0, 1)) + b"s."
    tensors = read_torch_tensors(write_pickle(tmp_path / "model.pt", content, values=np.float32([1, 2]).tobytes()))
    np.testing.assert_array_equal(tensors["w"], [[1, 2]] * 3)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"(S'id'\nios\nsystem\n.", "could run code"),
        (b"(cos\nsystem\nS'id'\no.", "could run code"),
        (b"\x80\x04cbuiltins\neval\n)}\x92.", "could run code"),
        (b"\x80\x02\x82\x01.", "could run code"),
        (b"\x80\x02Nt.", "mark is missing"),
        (b"\x80\x02K\x01)R.", "damaged"),
        (b"\x80\x02}" + NESTED_TUPLE + b"K\x01s.", "other keys"),
        (b"\x80\x02ccollections\nOrderedDict\n]" + NESTED_TUPLE + b"K\x01\x86a\x85R.", "other keys"),
        (TWICE, "more than 1048576 entries"),
        (b"\x80\x04\x8d" + bytes(7) + b"\x01x.", "damaged"),
        (b"\x80\x02}" + NAME + pickle_tensor(shape=(2**40,), strides=(0,)) + b"s.", "more than 16 times"),
        (b"\x80\x02](" + pickle_tensor(shape=(2,)) * 17 + b"e.", "more than 16 times"),
        (b"\x80\x02}" + NAME + pickle_tensor(shape=(-2,)) + b"s.", "outside"),
        (b"\x80\x02}" + NAME + pickle_tensor(shape=(1, 1)) + b"s.", "no shape"),
        (
            b"\x80\x02}" + NAME + pickle_tensor().replace(b"K\x02\x85", b"(X\x00\x00\x00\x00t", 1) + b"s.",
            "whole numbers",
        ),
    ],
)
def test_hostile_pickles_are_refused(tmp_path, content, rule):
    with pytest.raises(UserError, match=rule):
        read_torch_tensors(write_pickle(tmp_path / "model.pt", content))


def test_compressed_values_are_not_unpacked(tmp_path):
    content = b"\x80\x02}" + NAME + pickle_tensor() + b"s."
    path = write_pickle(tmp_path / "model.pt", content, values=bytes(1 << 20), method=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 4096
    with pytest.raises(UserError, match="compressed"):
        read_torch_tensors(path)


def test_two_tensors_of_a_name_are_refused(tmp_path):
    inner = b"X\x01\x00\x00\x00a}X\x01\x00\x00\x00b" + pickle_tensor() + b"s"
    content = b"\x80\x02}(X\x03\x00\x00\x00a.b" + pickle_tensor() + inner + b"u."
    with pytest.raises(UserError, match=r"two tensors have the name a\.b"):
        read_torch_tensors(write_pickle(tmp_path / "model.pt", content))


def test_lengths_beyond_the_end_of_an_older_file_take_no_memory(tmp_path):
    path = tmp_path / "model.pt"
    start = b"".join(pickle.dumps(each, protocol=2) for each in (0x1950A86A20F9469CFC6C, 1001, {}))
    path.write_bytes(start + b"\x80\x04\x8d" + bytes(7) + b"\x01x.")
    with pytest.raises(UserError, match="damaged"):
        read_torch_tensors(path)


def test_missing_weights_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(MissingError, match=r"I3D weights.*convert\.py rgb_imagenet\.pt i3d\.safetensors"):
        load_i3d(tmp_path / "i3d.safetensors")


def test_weights_of_another_network_name_their_file(tmp_path):
    convert_torch_file(write_torch_file(tmp_path / "model.pt"), tmp_path / "i3d.safetensors")
    with pytest.raises(UserError, match=r"i3d\.safetensors is invalid as I3D weights.*rgb_imagenet\.pt"):
        load_i3d(tmp_path / "i3d.safetensors")


def test_converted_tensors_take_another_dtype(tmp_path):
    source, destination = write_torch_file(tmp_path / "model.pt"), tmp_path / "half.safetensors"
    convert_torch_file(source, destination, dtype=np.float16)
    assert load_file(destination)["a.w"].dtype == np.float16
    with pytest.raises(UserError, match="another suffix"):
        convert_torch_file(source, tmp_path / "half.bin")
    with pytest.raises(UserError, match="it exists"):
        convert_torch_file(source, tmp_path / "new" / ".." / destination.name)
