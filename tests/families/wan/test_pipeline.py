"""Pipelines of Wan: loading, saving, two experts, adapters and errors."""

import json
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import dit_video
from dit_video.core.errors import MissingError, UserError
from dit_video.core.trees import flatten
from dit_video.diffusion import Guidance, Lcm, UniPc, UniPcFlowSchedule
from dit_video.families import get_lora_modules
from dit_video.families.wan.pipeline import DENOISER
from dit_video.loading import read_config
from dit_video.nn import merge_lora
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.preview import PreviewFit
from dit_video.weights import load, load_lora, save, save_lora
from support.latents import generate_latents
from support.tiny_t5 import CONFIG as TEXT
from support.tiny_t5 import write_encoder, write_tokenizer
from support.tiny_wan import DIT, SIZE, TWO, VAE, write_wan

PROMPT = "a red  ball &amp; cube"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with two experts, which share a program with one, to be read only."""
    folder = tmp_path_factory.mktemp("wan") / "two"
    write_wan(folder, **TWO)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return dit_video.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def one(pipeline):
    """Return a pipeline of the expert for noisy times alone."""
    return alone(pipeline, "backbone")


def alone(pipeline, expert):
    params = {"backbone": pipeline.denoiser_params[expert], "text": {}}
    config = replace(pipeline.config, boundary=None)
    parameters = {"autoencoder": pipeline.codec.params, "denoiser": params}
    return Pipeline(config, **parameters, get_lora_modules=get_lora_modules)


def sample_latents(pipeline, prompt=PROMPT, **options):
    return generate_latents(pipeline, prompt, size=SIZE, **{"steps": 4, "guidance": 2.0} | options)


@pytest.mark.slow
def test_a_preview_decoder_in_the_folder_is_loaded(one, tmp_path):
    write_wan(tmp_path / "wan")
    assert dit_video.load(tmp_path / "wan", dtype="float32").preview_decoder is None
    clip = one.decode(np.zeros((2, 2, 2, VAE.channels), np.float32))
    fit = PreviewFit(VAE.stride, VAE.channels)
    fit.add(np.random.default_rng(0).normal(size=(2, 2, 2, VAE.channels)), clip.frames)
    fit.solve().save(tmp_path / "wan" / "preview.safetensors")
    decoder = dit_video.load(tmp_path / "wan", dtype="float32").preview_decoder
    assert decoder is not None
    assert decoder.channels == VAE.channels


def test_a_config_does_not_depend_on_the_working_directory(pipeline, folder, tmp_path, monkeypatch):
    """Frozen encoders are opened at the first prompt, or by a run that was continued elsewhere."""
    monkeypatch.chdir(folder.parent)
    relative = dit_video.load(folder.name, dtype="float32")
    write_encoder(tmp_path / "t5", replace(TEXT, position_bias="each layer"))
    write_tokenizer(tmp_path / "t5")
    monkeypatch.chdir(tmp_path)
    moved = read_config(folder, text_encoder="t5")
    assert moved.model.text_encoder.folder == str(tmp_path / "t5")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(sample_latents(relative), sample_latents(pipeline))


def test_fastwan_samples_with_its_own_steps(tmp_path):
    write_wan(tmp_path / "wan", _class_name="WanDMDPipeline")
    config = read_config(tmp_path / "wan")
    assert (config.sampling.solver, config.sampling.guidance) == (Lcm(), Guidance(scales={"text": 1.0}))
    np.testing.assert_allclose(config.sampling.make_times(config.model.process).times, [1, 0.757, 0.522, 0])
    pipe = dit_video.load(tmp_path / "wan", dtype="float32")
    explicit = sample_latents(pipe, times=(1, 0.757, 0.522), solver="lcm", guidance=1, steps=None)
    np.testing.assert_array_equal(sample_latents(pipe, steps=None, guidance=None), explicit)


def test_sparse_attention_is_named(tmp_path):
    """FastWan's other models have weights of a gate for it, and would be refused for what cannot be used."""
    write_wan(tmp_path / "wan", _class_name="WanDMDPipeline")
    file = tmp_path / "wan" / "transformer" / "diffusion_pytorch_model.safetensors"
    save(file, load(file, dtype=None) | {"blocks.0.to_gate_compress.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(UserError, match=r"sparse attention \(VSA\) \(blocks.0.to_gate_compress.weight\)"):
        dit_video.load(tmp_path / "wan")


@pytest.mark.wrong_types
@pytest.mark.parametrize("name", ["dtype", "text_dtype"])
def test_another_dtype_is_refused(folder, name):
    for read in (dit_video.load, read_config):
        with pytest.raises(UserError, match=f"{name}='float16' is invalid: weights are read in bfloat16 or float32"):
            read(folder, **{name: "float16"})


def test_the_pipeline_config_is_read_from_the_folder(pipeline, folder):
    config = pipeline.config
    assert (config.model.backbone, config.boundary, config.model.autoencoder) == (DIT, 0.875, VAE)
    assert (config.model.text_encoder.folder, config.model.text_encoder.max_tokens) == (
        str(folder / "text_encoder"),
        512,
    )
    assert (config.model.process.shift, config.sampling.solver, config.sampling.time_schedule) == (
        3.0,
        UniPc(),
        UniPcFlowSchedule(),
    )
    assert (config.sampling.steps, config.sampling.guidance.get_scale("text")) == (50, 5.0)
    assert (config.size, config.fps) == ((81, 480, 832), 16.0)
    assert pipeline.count_parameters().keys() == {"autoencoder", "backbone", "low_noise", "text"}


def test_a_pipeline_generates_a_clip(one):
    clip = one.generate(PROMPT, size=SIZE, steps=4, guidance=2.0)
    assert clip.frames.shape == (*SIZE, 3)
    assert clip.fps == 16.0


def test_texts_are_cleaned_and_what_is_cut_is_said_once(one):
    latents = sample_latents(one)
    np.testing.assert_array_equal(sample_latents(one, "a red ball & cube "), latents)
    assert np.abs(sample_latents(one, "a red ball amp cube") - latents).max() > 1e-4
    with pytest.warns(UserWarning, match="a text of .* tokens is cut to 512") as caught:
        twice = [sample_latents(one, "red " * 600) for _ in range(2)]
    np.testing.assert_array_equal(*twice)
    assert len(caught) == 1


def test_each_expert_has_its_times_and_its_guidance(pipeline, one):
    """With a shift of 3 the times of the four steps are 0.999, 0.9, 0.75 and 0.501: two for each expert."""
    both, low = sample_latents(pipeline), alone(pipeline, "low_noise")
    assert min(np.abs(both - sample_latents(each)).max() for each in (one, low)) > 1e-3
    np.testing.assert_array_equal(sample_latents(pipeline, guidance=(2.0, 2.0)), both)
    assert np.abs(sample_latents(pipeline, guidance=(2.0, 3.0)) - both).max() > 1e-3
    for boundary, expert in ((0.4, one), (1.0, low)):
        config = replace(pipeline.config, boundary=boundary)
        other = pipeline.replace(config=config)
        np.testing.assert_allclose(sample_latents(other), sample_latents(expert), atol=1e-5)
    with pytest.raises(UserError, match=r"guidance={'text': \(2\.0, 3\.0\)} is invalid: .* Use one number"):
        sample_latents(one, guidance=(2.0, 3.0))
    with pytest.raises(UserError, match=r"boundary=875.* is invalid: .* from 0 to 1"):
        replace(pipeline.config, boundary=875.0)


def test_a_pipeline_saved_in_the_native_layout_is_the_same(pipeline, tmp_path):
    pipeline.save(tmp_path / "own")
    again = dit_video.load(tmp_path / "own")
    assert again.config == pipeline.config
    np.testing.assert_array_equal(sample_latents(again), sample_latents(pipeline))


def test_parameters_are_placed_one_at_a_time(folder, pipeline):
    placed = {}
    loaded = dit_video.load(folder, place=lambda path, each: placed.setdefault(path, each.shape), dtype="bfloat16")
    assert loaded.config.model.backbone == replace(DIT, dtype="bfloat16")
    expected = {f"autoencoder/{path}": leaf.shape for path, leaf in flatten(pipeline.codec.params).items()}
    expected |= {path: leaf.shape for path, leaf in flatten(pipeline.denoiser_params).items()}
    assert placed == expected
    half = dit_video.load(folder, dtype="bfloat16")
    dtypes = {path: leaf.dtype for path, leaf in flatten(half.denoiser_params).items()}
    # The kernels of float32 products are not rounded: those of the time, and the head's.
    names, experts = ("time_in", "time_out", "modulation", "head"), ("backbone", "low_noise")
    kept = {f"{expert}/{name}/kernel" for expert in experts for name in names}
    halved = {path for path in dtypes if path.endswith("kernel")} - kept
    assert {dtypes[path] for path in halved} == {jnp.dtype("bfloat16")}
    assert {dtype for path, dtype in dtypes.items() if path not in halved} == {np.dtype("float32")}
    for path in kept:
        np.testing.assert_array_equal(flatten(half.denoiser_params)[path], flatten(pipeline.denoiser_params)[path])


# Adapters.


def lora_file(path, style, modules, *, rank=2):
    """Write the factors of two modules under the names of a style; return the change of each kernel, by path."""
    noise, tensors = np.random.default_rng(len(style)), {}
    names = {
        "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
        "comfyui": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
        "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    }[style]
    changes = {}
    for module in modules:
        a, b = (noise.normal(size=shape).astype(np.float32) for shape in ((rank, 16), (16, rank)))
        flat = module.replace(".", "_") if style == "kohya" else module
        tensors |= {names[0].format(flat): a, names[1].format(flat): b}
        changes[module] = (b @ a).T
    save(path, tensors)
    return changes


@pytest.mark.parametrize("style", ["diffusers", "comfyui", "kohya"])
def test_a_loaded_adapter_equals_a_merge_by_hand(pipeline, tmp_path, style):
    names = ("attn1.to_q", "attn2.to_v") if style == "diffusers" else ("self_attn.q", "cross_attn.v")
    query, value = f"blocks.1.{names[0]}", f"blocks.0.{names[1]}"
    changes = lora_file(tmp_path / "a.safetensors", style, [query, value])
    adapted = pipeline.load_lora(tmp_path / "a.safetensors", 0.5, expert="low_noise")
    result, before = flatten(adapted.denoiser_params), flatten(pipeline.denoiser_params)
    # A head's pairs are neighbours in the files, and half a head apart here.
    turned = changes[query].reshape(16, 2, 4, 2).swapaxes(2, 3).reshape(16, 16)
    expected = {
        "low_noise/blocks/query/kernel": (1, turned),
        "low_noise/blocks/cross_value/kernel": (0, changes[value]),
    }
    for path, leaf in before.items():
        leaf = np.array(leaf)
        if path in expected:
            layer, change = expected[path]
            leaf[layer] += 0.5 * change
        np.testing.assert_allclose(result[path], leaf, atol=1e-5, err_msg=path)


def test_adapters_are_stacked_and_written(one, tmp_path):
    lora_file(tmp_path / "a.safetensors", "diffusers", ["blocks.1.attn1.to_q"])
    lora_file(tmp_path / "b.safetensors", "kohya", ["blocks.1.self_attn.q"], rank=3)
    stacked = one.load_lora(tmp_path / "a.safetensors", 0.5).load_lora(tmp_path / "b.safetensors", 2)
    before = sample_latents(one)
    assert np.abs(sample_latents(stacked) - before).max() > 1e-3
    assert stacked._denoiser.tokenizer is one._denoiser.tokenizer
    params, modules = one.denoiser_params["backbone"], DENOISER.get_lora_modules(DIT)
    for name, weight in (("a", 0.5), ("b", 2.0)):
        adapter = load_lora(tmp_path / f"{name}.safetensors", params, modules)
        params = merge_lora(params, adapter, weight)
    result = flatten(stacked.denoiser_params["backbone"])
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(result[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("first", "style", "name"),
    [
        ("diffusers", "diffusers", "transformer.blocks.1.attn1.to_q.lora_A.weight"),
        ("authors", "comfyui", "diffusion_model.blocks.1.self_attn.q.lora_down.weight"),
    ],
)
def test_adapters_are_written_with_the_values_that_were_read(one, tmp_path, first, style, name):
    modules = DENOISER.get_lora_modules(DIT, primary_layout=first)
    lora_file(tmp_path / "a.safetensors", style, [name.split(".", 1)[1].rsplit(".", 2)[0]])
    adapter = load_lora(tmp_path / "a.safetensors", one.denoiser_params["backbone"], modules)
    save_lora(tmp_path / "b.safetensors", adapter, modules, style=style)
    original, written = load(tmp_path / "a.safetensors"), load(tmp_path / "b.safetensors")
    assert name in written
    for key, tensor in original.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)


def test_adapters_of_other_models_are_refused(one, tmp_path):
    lora_file(tmp_path / "a.safetensors", "diffusers", ["blocks.7.attn1.to_q"])
    with pytest.raises(UserError, match="not a LoRA of this model"):
        one.load_lora(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"expert='low_noise' is invalid: .*; leave out expert"):
        one.load_lora(tmp_path / "a.safetensors", expert="low_noise")


# Errors and the hub.


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "wan")


def change_index(folder, **values):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": "FluxPipeline"}, "of class FluxPipeline; known here: WanVACEPipeline, WanPipeline"),
        ({"boundary_ratio": None}, "two experts, but no boundary_ratio"),
        ({"transformer_2": [None, None]}, "a boundary_ratio, but one expert"),
    ],
)
def test_an_unsupported_model_index_is_refused(copied, index, message):
    change_index(copied, **index)
    with pytest.raises(UserError, match=message):
        dit_video.load(copied)


def test_missing_parts_are_named(copied):
    shutil.rmtree(copied / "vae")
    shutil.rmtree(copied / "transformer_2")
    with pytest.raises(MissingError, match="lacks the folders vae, transformer_2"):
        dit_video.load(copied)


def test_a_part_of_another_class_is_refused(copied):
    path = copied / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(UserError, match=r"FluxTransformer2DModel\. Supported .* WanTransformer3DModel"):
        dit_video.load(copied)


def test_a_name_on_the_hub_is_fetched(folder, monkeypatch):
    calls = []

    def fetch(name, *, allow_patterns):
        calls.append((name, tuple(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert dit_video.load("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", dtype="float32").config.model.backbone == DIT
    (index_name, index), (name, patterns) = calls
    assert index_name == name == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert index == ("model_index.json",)
    assert {"model_index.json", "transformer/*.safetensors", "vae/*.json", "tokenizer/*.json"} <= set(patterns)
    assert not any(pattern.endswith(("*", ".bin", ".pt")) for pattern in patterns)


def test_a_pipeline_of_an_unknown_class_is_not_downloaded(monkeypatch, tmp_path):
    def fetch(name, *, allow_patterns):
        assert allow_patterns == ["model_index.json"]
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(UserError, match=r"class FluxPipeline; known here: .*WanPipeline"):
        dit_video.load("black-forest-labs/FLUX.1-dev")


@pytest.mark.parametrize("is_made", [True, False])
def test_a_repository_in_another_layout_is_reported(monkeypatch, tmp_path, is_made):
    """The folder of a download without files is empty, or is not made."""
    snapshot = tmp_path if is_made else tmp_path / "none"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(snapshot))
    with pytest.raises(MissingError, match=r"no such pipeline: Wan-AI/Wan2\.1-T2V-1\.3B; .*B-Diffusers"):
        dit_video.load("Wan-AI/Wan2.1-T2V-1.3B")


def test_a_hub_that_cannot_be_reached_is_reported(monkeypatch, tmp_path):
    def fetch(name, **_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(MissingError, match=r"no such folder: Wan-AI/x; nor .* \(no route to host\): check the name"):
        dit_video.load("Wan-AI/x")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(MissingError, match="no such run: runs/mine"):  # the parent folder exists
        dit_video.load("runs/mine")
