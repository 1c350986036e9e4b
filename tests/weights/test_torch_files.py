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
from dit_video.weights.classifiers import load_i3d
from dit_video.weights.torch_files import convert_torch_file, read_torch_tensors
from support.torch_archives import ARCHIVE, OLDER_FORMAT, write_torch_file


class Trap:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def write_archive(path: Path, content: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(content, protocol=2))
    return path


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


def test_missing_weights_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(MissingError, match=r"I3D weights.*convert\.py rgb_imagenet\.pt i3d\.safetensors"):
        load_i3d(tmp_path / "i3d.safetensors")


def test_converted_tensors_take_another_dtype(tmp_path):
    source, destination = write_torch_file(tmp_path / "model.pt"), tmp_path / "half.safetensors"
    convert_torch_file(source, destination, dtype=np.float16)
    assert load_file(destination)["a.w"].dtype == np.float16
    with pytest.raises(UserError, match="another suffix"):
        convert_torch_file(source, tmp_path / "half.bin")
