"""Models are converted from one layout to another and back, bit for bit."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from dit_video.core.errors import MissingError, UserError
from dit_video.core.trees import flatten
from dit_video.families import get_lora_modules, load_autoencoder, load_denoiser, save_autoencoder, save_denoiser
from dit_video.families.convert import convert, convert_lora, convert_native_denoiser
from dit_video.models.autoencoders import CausalVaeConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.nn import get_param_shapes
from dit_video.sampling.pipeline_config import write_pipeline_config
from dit_video.tokens import Grid
from dit_video.weights import get_native_modules, load_lora, save, save_lora
from support.devices import HANG, PROGRAMS, make_environment
from support.random_params import make_random_params
from support.tiny_class_dit import DIT, SIT
from support.tiny_lora import CONFIG as PIPELINE
from support.tiny_t5 import CONFIG as TEXT
from support.tiny_t5 import write_encoder

WAN = WanDitConfig(channels=4, cond_channels=5, image_width=7, context_width=6, width=16, mlp_dim=24, layers=3, heads=2)
VAE = CausalVaeConfig(channels=4, width=4, multipliers=(1, 2), factors=(Grid(2, 2, 2),), blocks=1)
FILE = "diffusion_pytorch_model.safetensors"


def tensors(folder):
    """Return the tensors of all files, by name."""
    return {
        name: array
        for path in folder.glob("*.safetensors")
        for name, array in safetensors.numpy.load_file(path).items()
    }


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def assert_same_params(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, leaf in flatten(expected).items():
        np.testing.assert_array_equal(flatten(actual)[path], leaf, err_msg=path)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("config", "layouts"),
    [
        (WAN, ("diffusers", "authors", "dit_video")),
        (DIT, ("diffusers", "authors", "dit_video")),
        (SIT, ("authors", "dit_video")),
    ],
    ids=["Wan", "DiT", "SiT"],
)
def test_denoisers_are_converted_between_all_layouts_bit_for_bit(tmp_path, config, layouts):
    """A file converted from another layout equals the one written directly, also with mixed dtypes."""
    params = make_random_params(config.make)
    params["blocks"] = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params["blocks"])
    first = tmp_path / layouts[0]
    save_denoiser(first, config, params, layout=layouts[0], shard_bytes=9000)
    for layout in layouts[1:]:
        convert(first, tmp_path / layout, layout=layout, shard_bytes=9000)
        assert len(list((tmp_path / layout).glob("*.safetensors"))) > 1
        read = load_denoiser(tmp_path / layout, dtype=None)[1]
        assert_same_params(read, params)
        convert(tmp_path / layout, tmp_path / f"{layout} back", layout=layouts[0], shard_bytes=9000)
        files = sorted(path.name for path in first.iterdir())
        assert sorted(path.name for path in (tmp_path / f"{layout} back").iterdir()) == files
        for name in files:
            assert (tmp_path / f"{layout} back" / name).read_bytes() == (first / name).read_bytes(), name


def test_the_dtype_is_what_is_asked_for(tmp_path):
    params = make_random_params(WAN.make)
    save_denoiser(tmp_path / "in", WAN, params)
    convert(tmp_path / "in", tmp_path / "out", layout="dit_video", dtype=np.dtype("bfloat16"))
    assert {str(array.dtype) for array in tensors(tmp_path / "out").values()} == {"bfloat16"}
    result, read = load_denoiser(tmp_path / "out")
    assert result == WAN
    assert_same_params(read, jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype(np.float32), params))


@pytest.mark.slow
def test_a_single_checkpoint_file_of_the_authors_is_converted(tmp_path):
    config = dataclasses.replace(SIT, width=384, heads=6, layers=12, channels=1)
    save_denoiser(tmp_path / "folder", config, make_random_params(config.make), layout="authors")
    path = (tmp_path / "folder" / FILE).rename(tmp_path / "SiT-S-2-256x256.safetensors")
    convert(path, tmp_path / "own", layout="dit_video")
    convert(tmp_path / "own", tmp_path / "again", layout="authors")
    assert load_denoiser(tmp_path / "again")[0] == config
    assert_same_tensors(tensors(tmp_path / "again"), safetensors.numpy.load_file(path))


def test_autoencoders_are_converted_there_and_back(tmp_path):
    params = make_random_params(VAE.make)
    save_autoencoder(tmp_path / "vae", VAE, params)
    convert(tmp_path / "vae", tmp_path / "own", layout="dit_video")
    assert load_autoencoder(tmp_path / "own")[0] == VAE
    convert(tmp_path / "own", tmp_path / "again", layout="diffusers")
    assert_same_tensors(tensors(tmp_path / "again"), tensors(tmp_path / "vae"))
    assert_same_params(load_autoencoder(tmp_path / "again")[1], params)
    convert(tmp_path / "vae", tmp_path / "half", layout="diffusers", dtype=np.dtype("float16"))
    assert {str(array.dtype) for array in tensors(tmp_path / "half").values()} == {"float16"}
    np.testing.assert_array_equal(
        load_autoencoder(tmp_path / "half")[1]["normalizer"]["std"], params["normalizer"]["std"]
    )


@pytest.mark.parametrize("position_bias", ["shared", "each layer"])
def test_text_encoders_are_converted_there_and_back(tmp_path, position_bias):
    write_encoder(tmp_path / "t5", dataclasses.replace(TEXT, position_bias=position_bias))
    convert(tmp_path / "t5", tmp_path / "own", layout="dit_video")
    convert(tmp_path / "own", tmp_path / "again", layout="diffusers")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "t5" / name).read_bytes()
    with pytest.raises(UserError, match=r"text encoders .* Use diffusers"):
        convert(tmp_path / "t5", tmp_path / "authors", layout="authors")


def test_one_expert_of_a_pipeline_file_is_converted(tmp_path):
    own, other = make_random_params(WAN.make), make_random_params(WAN.make, seed=1)
    save(tmp_path / "denoiser.safetensors", {"backbone": own, "low_noise": other})
    convert_native_denoiser(tmp_path / "denoiser.safetensors", "low_noise/", WAN, tmp_path / "out", layout="diffusers")
    assert_same_params(load_denoiser(tmp_path / "out")[1], other)


def test_the_names_of_adapters_are_converted(tmp_path):
    save_denoiser(tmp_path / "wan", WAN, make_random_params(WAN.make))
    draw = np.random.default_rng(0)
    factors = {
        name: {
            "kernel": {
                "a": draw.normal(size=(3, 16, 2)).astype(np.float32),
                "b": draw.normal(size=(3, 2, 16)).astype(np.float32),
                "scale": np.full(3, 0.5),
            }
        }
        for name in ("query", "cross_out")
    }
    (features_in, features_out) = get_param_shapes(WAN.make)["embed"]["kernel"].shape
    a, b = (draw.normal(size=shape).astype(np.float32) for shape in ((features_in, 2), (2, features_out)))
    lora = {"blocks": factors, "embed": {"kernel": {"a": a, "b": b, "scale": np.asarray(0.5)}}}
    save_lora(tmp_path / "theirs.safetensors", lora, get_lora_modules(WAN))
    steps = ("authors", "dit_video", "diffusers")
    paths = [tmp_path / "theirs.safetensors", *(tmp_path / f"{to}.safetensors" for to in steps)]
    for before, after, to in zip(paths, paths[1:], steps, strict=False):
        convert_lora(before, after, tmp_path / "wan", layout=to)
    names = [set(safetensors.numpy.load_file(path)) for path in paths]
    assert "diffusion_model.blocks.2.self_attn.q.lora_down.weight" in names[1]
    assert "diffusion_model.patch_embedding.lora_up.weight" in names[1]
    assert "transformer.backbone.blocks.2.query.lora_A.weight" in names[2]
    assert paths[3].read_bytes() == paths[0].read_bytes()
    shapes = {"backbone": get_param_shapes(WAN.make)}
    assert_same_params(load_lora(paths[2], shapes, get_native_modules(shapes))["backbone"], lora)
    save_denoiser(tmp_path / "sit", SIT, make_random_params(SIT.make), layout="authors")
    with pytest.raises(UserError, match=r"DiTConfig, whose family has no LoRA files"):
        convert_lora(paths[0], tmp_path / "none.safetensors", tmp_path / "sit", layout="authors")


def test_an_adapter_is_never_written_over_nor_converted_without_its_model(tmp_path):
    save_denoiser(tmp_path / "pipeline" / "transformer", WAN, make_random_params(WAN.make))
    pair = {"a": np.ones((3, 16, 2), np.float32), "b": np.ones((3, 2, 16), np.float32), "scale": np.ones(3)}
    source, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_lora(source, {"blocks": {"query": {"kernel": pair}}}, get_lora_modules(WAN))
    content = source.read_bytes()
    for destination in (source, tmp_path / "b", tmp_path, tmp_path / "new" / ".." / source.name):
        with pytest.raises(UserError, match=r"exists or is no .safetensors file. Use a file that does not exist"):
            convert_lora(source, destination, tmp_path / "pipeline", layout="authors")
    with pytest.raises(UserError, match=r"is an adapter, whose names depend on its model. Name it: --model"):
        convert(source, tmp_path / "out", layout="authors")
    assert source.read_bytes() == content
    convert_lora(source, other, tmp_path / "pipeline", layout="diffusers")
    assert other.read_bytes() == content


def test_an_adapter_is_converted_by_the_config_of_a_pipeline_or_a_run(tmp_path):
    pair = {"a": np.ones((3, 16, 2), np.float32), "b": np.ones((3, 2, 16), np.float32), "scale": np.ones(3)}
    source, run = tmp_path / "a.safetensors", tmp_path / "run"
    save_lora(source, {"blocks": {"query": {"kernel": pair}}}, get_lora_modules(WAN))
    backbone = dataclasses.replace(WAN, context_width=16, cond_channels=0, image_width=None)
    for folder, model in ((run, run), (tmp_path / "other" / "pipeline", tmp_path / "other")):
        write_pipeline_config(folder, PIPELINE.replace_model(backbone=backbone))
        convert_lora(source, tmp_path / f"{model.name}.safetensors", model, layout="diffusers")
        assert (tmp_path / f"{model.name}.safetensors").read_bytes() == source.read_bytes()
    write_pipeline_config(run, PIPELINE)
    with pytest.raises(UserError, match=r"run holds a DiTConfig, whose family has no LoRA files"):
        convert_lora(source, tmp_path / "b.safetensors", run, layout="diffusers")
    for model in (tmp_path, tmp_path / "nowhere"):
        rule = r"it has neither config.json of a transformer nor pipeline.json of a pipeline or a run"
        with pytest.raises(MissingError, match=rf"model={model} is invalid: {rule}. Use the folder"):
            convert_lora(source, tmp_path / "b.safetensors", model, layout="diffusers")


def test_the_bias_of_an_adapter_is_converted_to_every_layout(tmp_path):
    save_denoiser(tmp_path / "wan", WAN, make_random_params(WAN.make))
    name, draw = "transformer.blocks.1.attn1.to_q.lora_", np.random.default_rng(0)
    shapes = {"A.weight": (2, 16), "B.weight": (16, 2), "B.bias": (16,)}
    tensors = {name + end: draw.normal(size=shape).astype(np.float32) for end, shape in shapes.items()}
    save(tmp_path / "source.safetensors", tensors)
    before = tmp_path / "source.safetensors"
    for to in ("diffusers", "authors", "dit_video"):
        after = tmp_path / f"{to}.safetensors"
        convert_lora(before, after, tmp_path / "wan", layout=to)
        convert_lora(after, tmp_path / f"{to} back.safetensors", tmp_path / "wan", layout="diffusers")
        assert_same_tensors(safetensors.numpy.load_file(tmp_path / f"{to} back.safetensors"), tensors)
    assert "transformer.backbone.blocks.1.query.lora_B.bias" in safetensors.numpy.load_file(after)


def test_an_unknown_class_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    for kind in ("WanTransformer3DModel", "DiTTransformer2DModel", "AutoencoderKLWan", "VQModel", "umt5", "SiT"):
        with pytest.raises(UserError, match=rf"class FluxTransformer2DModel\. Supported classes are .*{kind}"):
            convert(tmp_path, tmp_path / "out", layout="authors")
    with pytest.raises(MissingError, match=r"config\.json"):
        convert(tmp_path / "nowhere", tmp_path / "out", layout="authors")


def test_a_folder_with_files_is_not_written_over(tmp_path):
    save_denoiser(tmp_path, SIT, make_random_params(SIT.make), layout="authors")
    for destination in (tmp_path, tmp_path / "new" / ".."):
        with pytest.raises(UserError, match="exists and is not empty"):
            convert(tmp_path, destination, layout="dit_video")
    with pytest.raises(UserError, match="a SiT can't be written in its layout"):
        convert(tmp_path, tmp_path / "out", layout="diffusers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["authors", "dit_video"])
def test_tensors_that_do_not_fit_are_all_named(tmp_path, to):
    save_denoiser(tmp_path / "in", WAN, make_random_params(WAN.make))
    stored = safetensors.numpy.load_file(tmp_path / "in" / FILE)
    for name in [name for name in stored if name.startswith("blocks.1.")][:12]:
        del stored[name]
    stored["surplus"] = stored["scale_shift_table"] = np.zeros((1, 2, 15), np.float32)
    safetensors.numpy.save_file(stored, tmp_path / "in" / FILE)
    with pytest.raises(UserError, match=r"12 missing \(.*… 2 more\); 1 unexpected \(surplus\); 1 misshapen \(scale_"):
        convert(tmp_path / "in", tmp_path / "out", layout=to)
    assert not (tmp_path / "out").exists()


LARGE = dataclasses.replace(WAN, width=768, mlp_dim=3072, layers=10, heads=6)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="reads peaks from Linux's /proc")
@pytest.mark.parametrize("to", ["authors", "dit_video"])
def test_converting_takes_the_memory_of_one_file_at_most(tmp_path, to):
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), get_param_shapes(LARGE.make))
    save_denoiser(tmp_path / "in", LARGE, params, shard_bytes=60_000_000)
    save_denoiser(tmp_path / "small", WAN, make_random_params(WAN.make))
    files = [path.stat().st_size for path in (tmp_path / "in").glob("*.safetensors")]
    assert sum(files) > 3 * 1.2 * max(files)
    program = [sys.executable, "-P", str(PROGRAMS / "conversion_memory.py")]
    arguments = [str(tmp_path / "in"), str(tmp_path / "small"), str(tmp_path / "out"), to]
    done = subprocess.run(
        [*program, *arguments],
        env=make_environment(1),
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1.2 * max(files)
