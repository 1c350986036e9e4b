import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import dit_video
from dit_video.core.errors import MissingError, UserError
from dit_video.loading import read_config
from dit_video.weights.safetensors import save
from support.latents import generate_latents
from support.tiny_clip import VISION, write_clip
from support.tiny_wan import ANIMATING, SIZE, write_animating_wan


def sample_latents(pipeline):
    return generate_latents(pipeline, "a red circle", size=(1, 16, 16), seed=5)


def test_a_run_and_its_pipeline_folder_are_the_same_pipeline(tiny_run, tiny_pipeline):
    alone = dit_video.load(tiny_run / "pipeline")
    assert alone.config == tiny_pipeline.config
    np.testing.assert_array_equal(sample_latents(alone), sample_latents(tiny_pipeline))


def test_dtypes_are_for_open_weights(tiny_run):
    for options in ({"dtype": "bfloat16"}, {"place": lambda path, parameter: parameter}):
        with pytest.raises(UserError, match=r"dtype, text_dtype and place are for open weights; .*, leave them out"):
            dit_video.load(tiny_run, **options)


def test_a_path_may_be_a_string(tiny_run, tiny_pipeline):
    assert dit_video.load(str(tiny_run)).config == tiny_pipeline.config


@pytest.mark.nightly
def test_a_finished_run_without_an_export_gives_the_same_pipeline(tiny_run, tiny_pipeline, tmp_path):
    copy = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(copy / "pipeline")
    np.testing.assert_array_equal(sample_latents(dit_video.load(copy)), sample_latents(tiny_pipeline))


def test_a_pipeline_needs_nothing_else_of_its_run(tiny_run, tiny_pipeline, tmp_path):
    copy = shutil.copytree(tiny_run / "pipeline", tmp_path / "pipeline")
    np.testing.assert_array_equal(sample_latents(dit_video.load(copy)), sample_latents(tiny_pipeline))


def test_encoders_that_have_moved_are_named(tmp_path):
    folder, moved = tmp_path / "wan", tmp_path / "moved"
    write_animating_wan(folder, backbone=replace(ANIMATING, layers=1))
    before = dit_video.load(folder, dtype="float32")
    before.save(tmp_path / "saved")
    image = np.zeros((16, 16, 3), np.uint8)
    expected = generate_latents(before, "a red circle", size=SIZE, image=image, steps=1)
    folder.rename(moved)
    options = {}
    for name, fix in (
        ("image_encoder", r"image_encoder=FOLDER \(--image"),
        ("text_encoder", r"text_encoder=FOLDER \(--text"),
    ):
        with pytest.raises(MissingError, match=rf"{name}/config\.json\. If the encoder has moved, use {fix}"):
            dit_video.load(tmp_path / "saved", **options).generate("a red circle", size=SIZE, image=image, steps=1)
        options[name] = moved / name
    pipeline = dit_video.load(tmp_path / "saved", **options)
    latents = generate_latents(pipeline, "a red circle", size=SIZE, image=image, steps=1)
    np.testing.assert_array_equal(latents, expected)
    assert pipeline.config == read_config(tmp_path / "saved", **options)
    assert dit_video.load(moved, image_encoder=moved).config.model.image_encoder == str(moved)
    write_clip(tmp_path / "other", replace(VISION, width=2 * VISION.width))
    with pytest.raises(UserError, match=r"image_encoder=.*other is invalid: it makes tokens of width 24"):
        dit_video.load(tmp_path / "saved", image_encoder=tmp_path / "other")


def test_a_model_without_an_image_encoder_gets_none(tiny_run):
    with pytest.raises(UserError, match=r"image_encoder=clip is invalid: this model has no image encoder"):
        dit_video.load(tiny_run, image_encoder="clip")


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(MissingError, match="no such run"):
        dit_video.load(tmp_path / "nowhere")
    (tmp_path / "wan2.1_t2v.safetensors").write_text("")
    with pytest.raises(
        UserError, match=r"wan2.1_t2v.safetensors is a file; name the folder of a run, or of a pipeline"
    ):
        dit_video.load(tmp_path / "wan2.1_t2v.safetensors")


@pytest.mark.parametrize(
    ("files", "fix"),
    [
        ([], "name a run or open weights"),
        (
            ["config.json", "Wan2.1_VAE.pth"],
            "in the layout of the model's authors, or of ComfyUI: name .* Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        ),
        (["config.json", "configuration.json"], "in the layout of the model's authors"),
        (["configuration.json", "high_noise_model"], "in the layout of the model's authors"),
        (["diffusion_models", "vae"], "in the layout of the model's authors, or of ComfyUI"),
        (["ltx-video-2b-v0.9.5.safetensors"], "in the layout of the model's authors"),
        (["config.json", "model.safetensors"], "one model without its pipeline: name the folder of a whole pipeline"),
        (["../model_index.json", "config.json"], "it is a part of a pipeline: name .*repository"),
    ],
    ids=lambda value: None if isinstance(value, str) else ", ".join(value),
)
def test_a_folder_without_a_run_or_pipeline_is_refused(tmp_path, files, fix):
    """The message says what it is, whatever the options."""
    folder = tmp_path / "repository" / "part"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("{}")
    for options in ({}, {"dtype": "bfloat16"}, {"step": 3}):
        with pytest.raises(UserError, match=rf"holds neither pipeline\.json nor experiment\.json nor .*; .*{fix}"):
            dit_video.load(folder, **options)


_WAN = {"blocks.0.self_attn.q.weight": (1536, 1), "patch_embedding.weight": (1536, 16)}
_LARGE_WAN = {"blocks.0.self_attn.q.weight": (5120, 1), "patch_embedding.weight": (5120, 36)}
_ANIMATING = _LARGE_WAN | {"img_emb.proj.0.weight": (1,)}
_EXPERT = {"blocks.0.self_attn.q.weight": (5120, 1)}
_VACE = _WAN | {"vace_blocks.0.self_attn.q.weight": (1536, 1)}
_LTX = {"model.diffusion_model.transformer_blocks.0.attn2.q_norm.weight": (2048,), "vae.decoder.bias": (1,)}
_DIT = {"y_embedder.embedding_table.weight": (5, 2)}


@pytest.mark.parametrize(
    ("file", "tensors", "family", "model"),
    [
        ("wan2.1_t2v.safetensors", _WAN, "wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("i2v.safetensors", _ANIMATING, "wan", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
        ("low_noise_model/a.safetensors", _LARGE_WAN, "wan", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
        ("t2v.safetensors", {"blocks.0.attn1.to_q.weight": (5120, 1)}, "wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        ("high_noise_model/a.safetensors", _EXPERT, "wan", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
        ("vace.safetensors", _VACE, "vace", "Wan-AI/Wan2.1-VACE-1.3B-diffusers"),
        ("ltx-video-2b-v0.9.5.safetensors", _LTX, "ltx", "Lightricks/LTX-Video-0.9.5"),
        ("dit.safetensors", _DIT, "dit", "facebook/DiT-XL-2-256, or one .* in transformer/ beside vae/"),
        ("DiT-XL-2-256x256.pt", None, "dit", "facebook/DiT-XL-2-256"),
    ],
)
def test_weights_in_another_layout_are_recognised_by_their_tensors(tmp_path, file, tensors, family, model):
    """The message names the pipeline to load instead, of a single file and of the folder that holds it."""
    path = tmp_path / ("DiT-XL-2" if tensors is None else "model") / file
    path.parent.mkdir(parents=True)
    if tensors is None:
        path.write_bytes(b"PK\x03\x04")
    else:
        save(path, {name: np.zeros(shape, np.int8) for name, shape in tensors.items()})
    with pytest.raises(UserError, match=rf"{file} is a file with weights of the family {family}; .* such as {model}"):
        dit_video.load(path)
    with pytest.raises(UserError, match=rf"or of ComfyUI, with weights of the family {family}: .* such as .*{model}"):
        dit_video.load(path.parent)


def test_an_expert_in_the_layout_of_the_authors_is_refused(tmp_path):
    (tmp_path / "high_noise_model").mkdir()
    (tmp_path / "high_noise_model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="in the layout of the model's authors"):
        dit_video.load(tmp_path / "high_noise_model")


def document(tiny_run):
    return json.loads((tiny_run / "pipeline" / "pipeline.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda written: written | {"format": 0}, "format 0, this version reads 1; export it again"),
        (lambda written: [written], "format None"),
        (lambda written: {"format": 1}, "holds no pipeline's config"),
        (lambda written: written | {"config": written["config"]["model"]}, "holds no pipeline's config"),
        (lambda written: written | {"config": {"type": "subprocess:Popen", "args": "id"}}, "lies outside dit_video"),
        (lambda written: written | {"config": written["config"] | {"colour": 1}}, "no field colour"),
        (
            lambda written: written | {"config": {"type": "dit_video.sampling.pipeline:PipelineConfig"}},
            "lacks the field",
        ),
        (
            lambda written: (
                written | {"config": written["config"] | {"model": {"type": "dit_video.core.errors:UserError"}}}
            ),
            "is not a dataclass",
        ),
        (lambda written: written | {"config": written["config"] | {"size": [17, 32]}}, "2 values .* Grid has 3"),
    ],
)
def test_a_pipeline_of_another_version_or_of_foreign_types_is_refused(tiny_run, tmp_path, change, message):
    copy = shutil.copytree(tiny_run / "pipeline", tmp_path / "pipeline")
    (copy / "pipeline.json").write_text(json.dumps(change(document(tiny_run))))
    with pytest.raises(UserError, match=message) as error:
        dit_video.load(copy)
    assert "\n" not in str(error.value)


def test_an_incomplete_pipeline_is_refused(tiny_run, tmp_path):
    copy = shutil.copytree(tiny_run / "pipeline", tmp_path / "pipeline")
    weights = copy / "denoiser.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        dit_video.load(copy)
    weights.unlink()
    with pytest.raises(MissingError, match="no such file"):
        dit_video.load(copy)
    (copy / "pipeline.json").write_text('{"format": 1')
    with pytest.raises(UserError, match="is not valid JSON"):
        dit_video.load(copy)


def test_weights_of_another_config_are_refused(tiny_run, tmp_path):
    copy = shutil.copytree(tiny_run / "pipeline", tmp_path / "pipeline")
    written = document(tiny_run)
    written["config"]["model"]["backbone"] |= {"width": 32}
    (copy / "pipeline.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match="does not fit the model"):
        dit_video.load(copy)
