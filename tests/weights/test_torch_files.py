"""Tensors of PyTorch's files, read without running anything of them."""

import base64
import collections
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.weights.torch_files import read_torch_tensors

_OLDER_FORMAT = (
    "c-n1GJx{|h5OqG9f}y1=8)I22h+3gebU<A!zRKbSMIo_TBP;INP7z3zGF8BDU|{60@e`03xU@oI!1A5!ckk}qtNd50zTd`Q2lpRW`@PCP{|qoM"
    "fpmF?5HdH~=}fC+A&ix}01pYgg%u^8Qz8*XF4F@1XHF4xk8_b&`6Mg^O9;EXfuNmf<DkKO9^g+F4k8xvu%4ldDKuGFmcN=FqA7Sw@Yl}=2r{Ql"
    "HtQv&lgiS>h`Um%JaMA1+9ZpZqD+@JYaL{!Qvr=l3mq$+x|<D1A>wW14Ex7%f7l-k;-mN^hUR*uY+k|^i!K~&Uo*l2=C6P<j|D5(dCAbd5}8Bu"
    "mR_1%7?GdJ%u(1qoIuM#djflQy=?&<=G9hif&8cDrM-y!J=H0u5nhZ6<9+l4x@~IU"
)
"""`torch.save({"a": {"w": arange(6.).reshape(2, 3).t()}, "n": 1}, ..., _use_new_zipfile_serialization=False)`."""
_ARCHIVE = (
    "c-p0uKX21O7{<?bY6nA;v`b2duDAly#7S%i1gRqA#RH)TDe7Xm&Jiq}xMyEdfmA61QHhN*Fe1JM6Q2RWjKsizm^!m@XM<}yG_>^O^ZCy`@BRGV"
    "^SWzrIRNr`Fw;t48Cbsk$eF;6zJ;yI?qgT)6u@?>P1$_}q#i>A7Gm}h8(!`q&c+@QSIjYX+(0yaxHER#zKP)|@O*P3izp{aJ%LOP$V_Vh(Ly8<"
    "b=R}-{pg{H_%L7<2|bRC_U;(v4IZNl_Y7cg277=+gE6=Rbn&Had#(#@?0BO<yzBR&5Bql<8;j`D`W9NmsIY~KK^Sg?N(M8obPXXdKl}Oh19?Py"
    "_rzqB!R<I1m4}``w6HmWen8gJJ2x^pIZLZihWAHbo>MGlF2gENj~RX^&9q!+FdD)U);sn8!B83$puLBFuw)5#F2E9K#{fG|F!X4S_0G+6eEzoU"
    "VC+K5@Z#3D%RE_ypUY54Yy@@XM)iF8kD^Z7<g`f+(x;@q+oVM0SKkj;$cvS^L`85lCW<X_<+Mn3k*@UV?cl+`^S=h<V*`XAA3)zB4tQ!&)0<9T"
    "?^Mp1i&|5awOXsytktw;Luu5jvQkxAn%YpStwvo{T8gI0ib^Sm>qnm@!Xbr}426w3lVwzzA<zCtvg%|3lvBz@2AouQ*&s<1ucm?=CWFjWPBu=`"
    "h)bzB%Pg2JfUG>}nnFtch6Ne#X0=Hl6jNG>16h}4#mVhiONn16#D6zV*WmeUe{9BGkCj4Z{K!P3mWxKB3ttI*bRYe}7Whabg!7}hzW^VxW?T"
)
"""The same in the current format."""


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


def write_fixture(path: Path, fixture: str) -> Path:
    path.write_bytes(zlib.decompress(base64.b85decode(fixture)))
    return path


@pytest.mark.parametrize("fixture", [_OLDER_FORMAT, _ARCHIVE], ids=["older", "archive"])
def test_reads_both_formats(tmp_path, fixture):
    tensors = read_torch_tensors(write_fixture(tmp_path / "model.pt", fixture))
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


@pytest.mark.parametrize("fixture", [_OLDER_FORMAT, _ARCHIVE], ids=["older", "archive"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_parts_of_files_are_damaged(tmp_path, fixture, share):
    path = write_fixture(tmp_path / "model.pt", fixture)
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
