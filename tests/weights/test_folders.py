import json
import re

import numpy as np
import pytest
import safetensors.numpy

from dit_video.core.errors import MissingError, UserError
from dit_video.weights import TensorFolder, load, load_lora

A, B, C = (np.random.default_rng(index).normal(size=(2, 3 + index)).astype(np.float32) for index in range(3))


def write_shards(folder, stem="model"):
    safetensors.numpy.save_file({"a": A, "b": B}, folder / f"{stem}-00001-of-00002.safetensors")
    safetensors.numpy.save_file({"c": C}, folder / f"{stem}-00002-of-00002.safetensors")
    files = {name: f"{stem}-0000{number}-of-00002.safetensors" for name, number in (("a", 1), ("b", 1), ("c", 2))}
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_shards_are_read_as_one_file(tmp_path, stem):
    write_shards(tmp_path, stem)
    with TensorFolder(tmp_path, stem=stem) as tensors:
        assert tensors.shapes == {"a": (2, 3), "b": (2, 4), "c": (2, 5)}
        for name, array in (("c", C), ("a", A), ("b", B)):
            np.testing.assert_array_equal(tensors.read(name), array)


@pytest.mark.parametrize(
    ("stem", "library", "read"), [("model", "transformers", "d"), ("diffusion_pytorch_model", "diffusers", "abc")]
)
def test_of_two_sets_of_weights_that_of_the_library_is_read(tmp_path, stem, library, read):
    """A model that is saved in other shards leaves the file of before; which of them is older cannot be known."""
    index = write_shards(tmp_path, stem)
    safetensors.numpy.save_file({"d": A}, tmp_path / f"{stem}.safetensors")
    with pytest.warns(UserWarning, match=rf"has both {stem}.safetensors and {index.name}; .* as {library} does"):
        tensors = TensorFolder(tmp_path, stem=stem)
    with tensors:
        assert "".join(tensors.shapes) == read
        np.testing.assert_array_equal(tensors.read(read[0]), A)


def write_header(path, names):
    """Write a file by hand, as NumPy has no float8."""
    header = {
        name: {"dtype": dtype, "shape": [2], "data_offsets": [2 * number, 2 * number + 2]}
        for number, (name, dtype) in enumerate(names.items())
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(2 * len(names)))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"a.weight": "F8_E4M3"}, r"float8 \(fp8\), which"),
        ({"a.weight": "F8_E5M2", "b": "U8"}, r"float8 \(fp8\), which"),
        ({"a.weight": "F8_E4M3", "a.scale_weight": "U8"}, "scaled float8 .* scales such as a.scale_weight"),
        ({"a.weight": "F8_E4M3", "a.weight_scale": "U8"}, "scaled float8 .* scales such as a.weight_scale"),
        ({"a.weight": "I8", "scaled_fp8": "U8"}, "scaled float8 .* scales such as scaled_fp8"),
        ({"b": "U8", "a.weight": "I8"}, r"integers \(I8\), such as a.weight, which"),
        ({"a.weight": "U8"}, r"integers \(U8\), such as a.weight, which"),
    ],
)
def test_quantized_weights_are_refused(tmp_path, names, words):
    """Weights that are cast without their scales would be other ones, so that no one is told to cast them."""
    path = tmp_path / "model.safetensors"
    write_header(path, names)
    for read in (lambda: TensorFolder(tmp_path), lambda: load(path), lambda: load_lora(path, {}, {})):
        with pytest.raises(UserError, match=rf"has its weights in {words}.*Use the file in bfloat16 or float16"):
            read()


def test_folders_without_weights_are_refused(tmp_path):
    with pytest.raises(MissingError, match="no such folder"):
        TensorFolder(tmp_path / "absent")
    with pytest.raises(
        MissingError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json\. Copy them"
    ):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model.safetensors.index.fp16.json"])
def test_variants_are_named(tmp_path, name):
    (tmp_path / name).touch()
    (tmp_path / "model.fp16-00001-of-00002.safetensors").touch()
    with pytest.raises(MissingError, match=rf"has a variant of other dtypes \({re.escape(name)}\)\. Give it that name"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(
    ("config", "command"),
    [
        (
            {"architectures": ["UMT5EncoderModel"]},
            r"import transformers as l; l.UMT5EncoderModel.from_pretrained\(",
        ),
        ({"_class_name": "WanTransformer3DModel"}, r"import diffusers as l; l.WanTransformer3DModel"),
        ({"architectures": ['x"; rm -rf ~']}, "load them with the library"),
        ([], "load them with the library"),
        (None, "load them with the library"),
    ],
)
def test_pickles_are_refused_with_the_conversion(tmp_path, config, command):
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(b"\x80\x02")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"pickles \(pytorch_model-00001-of-00001.bin\).*{command}") as caught:
        TensorFolder(tmp_path)
    assert "\n" not in str(caught.value)
    assert "rm -rf" not in str(caught.value)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    index = write_shards(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["d"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"00002-of-00002.safetensors lacks d, which its index lists"):
        TensorFolder(tmp_path)
    for wrong in ({}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}, []):
        index.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="no weight_map"):
            TensorFolder(tmp_path)
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingError, match=r"lacks 1 of 2 files that model.*\(model-00002-of-00002.safetensors\)"):
        TensorFolder(tmp_path)


def test_damaged_and_pickled_shards_are_refused(tmp_path):
    write_shards(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"00002-of-00002.safetensors is not a complete safetensors file"):
        TensorFolder(tmp_path)
    shard.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match="is a pickled file"):
        TensorFolder(tmp_path)
