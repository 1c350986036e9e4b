"""`experiments/sample.py` with options of sampling and memory, and what it refuses before it reads weights."""

import json

import numpy as np
import pytest

import dit_video
from dit_video.core.offload import Stages, is_in_host_memory
from dit_video.core.trees import flatten
from dit_video.models.autoencoders import Tiles
from dit_video.sampling.pipeline import Pipeline
from dit_video.video.clip import Clip
from dit_video.video.decode import decode
from dit_video.weights import save
from support.tiny_lora import make_pipeline, write_lora
from support.tiny_wan import TWO, write_animating_wan, write_wan

SAMPLE = "experiments/sample.py"
PROMPT = ("--prompt", "a dog", "--size", "1x16x16")
ENDS = ("--image", "image.png", "--last-image", "image.png")


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "wan"
    write_wan(folder, **TWO)
    return folder


@pytest.mark.slow
def test_options_reach_the_pipeline(script, two_experts, tmp_path, monkeypatch):
    used, generate_many = [], Pipeline.generate_many

    def record(self, *arguments, **options):
        used.append(self)
        return generate_many(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "generate_many", record)
    options = ("--dtype", "float32", "--text-dtype", "bfloat16", "--offload", "stages", "--decode-memory", "1GiB")
    options += ("--decode-tiles", 12, 12, 4)
    options += ("--times", 1, 0.9, 0.5, "--shift", 5, "--guidance", 9, 40, "--out", tmp_path / "clip.png")
    done = script(SAMPLE, two_experts, *PROMPT, *options)
    assert done.code == 0, done.err
    (pipeline,) = used
    assert (pipeline.config.model.backbone.dtype, pipeline.config.model.text_encoder.dtype) == ("float32", "bfloat16")
    assert (pipeline.model_parts.offload, pipeline.codec.memory) == (Stages(), 2**30)
    assert pipeline.codec.tiles == Tiles(height=12, width=12, overlap=4)
    assert all(map(is_in_host_memory, flatten(pipeline.denoiser_params).values()))

    resident = dit_video.load(two_experts, dtype="float32", text_dtype="bfloat16", offload=None)
    resident = resident.with_decoding(tiles=pipeline.codec.tiles)
    same = {"size": (1, 16, 16), "times": (1, 0.9, 0.5), "shift": 5, "guidance": (9.0, 40.0)}
    sampled = decode(tmp_path / "clip.png").frames.astype(int)
    assert np.abs(sampled - resident.generate("a dog", **same).frames).max() <= 1
    for change in ({"shift": None}, {"times": (1, 0.9, 0.4)}, {"guidance": 9.0}):
        assert np.abs(sampled - resident.generate("a dog", **(same | change)).frames).max() > 1, change


# What cannot be sampled is said before any weight is read.


@pytest.fixture
def unread(monkeypatch):
    """Let any attempt to read weights fail, also those of adapters."""

    def read(*_, **__):
        raise AssertionError("weights are read")

    for name in ("folders.TensorFolder.read", "folders.TensorFolder.read_row", "folders.TensorFolder.read_chunks"):
        monkeypatch.setattr(f"dit_video.weights.{name}", read)
    monkeypatch.setattr("dit_video.weights.safetensors.load", read)
    monkeypatch.setattr(dit_video, "load", read)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder of models, an image, an adapter of another model, and lists of prompts."""
    folder = tmp_path_factory.mktemp("files")
    write_wan(folder / "wan", **TWO)
    write_animating_wan(folder / "animating")
    pipeline = make_pipeline()
    pipeline.save(folder / "own")
    write_lora(folder / "own.safetensors", pipeline)
    tensors = {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": np.ones((2, 24), np.float32)}
    tensors |= {"diffusion_model.blocks.0.self_attn.q.lora_up.weight": np.ones((24, 2), np.float32)}
    save(folder / "wide.safetensors", tensors)
    Clip(np.zeros((1, 8, 8, 3), np.uint8), 1).save(folder / "image.png")
    np.save(folder / "noise.npy", np.zeros((1, 4, 5, 4), np.float32))
    size = {"frames": 1, "height": 16, "width": 16}
    for name, entry in {"image": {"image": "image.png", "method": "trained"}, "noise": {"noise": "noise.npy"}}.items():
        entries = [{"prompt": "a dog", **size}, {"prompt": "a cat", **size, **entry}]
        (folder / f"{name}.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("wan", ("--lora", "wide.safetensors"), "misshapen (diffusion_model.blocks.0.self_attn.q.lora_down.weight"),
        ("wan", ("--lora", "own.safetensors"), "unexpected (backbone.blocks.0."),
        ("own", ("--lora", "wide.safetensors@0.5"), "wide.safetensors is not a LoRA of this model"),
        ("own", ("--lora", "own.safetensors@1@low_noise"), "expert='low_noise' is invalid: this model has one expert"),
        ("wan", ("--image", "image.png", "--method", "trained"), "method='trained' is invalid"),
        ("own", ("--control", "image.png"), "control of a request is invalid: this model was not trained with it"),
        ("animating", (), "a clip of one frame is invalid: this model animates an image. Use 5 frames or more"),
        ("animating", ("--size", "5x16x16", "--out", "clip.mp4"), "this model needs an image"),
        (
            "animating",
            ("--size", "5x16x16", *ENDS, "--method", "trained", "--out", "clip.mp4"),
            "method='trained' is invalid",
        ),
        ("wan", ("--size", "1x20x16"), "height 20 is not divisible by 8"),
        ("own", ("--size", "1x20x16"), "height 20 is not divisible by 16"),
        ("wan", ("--size", "4x16x16", "--out", "clip.mp4"), "T=4 is not 1 + 4k"),
        ("wan", ("--steps", 3, "--times", 1, 0.5), "steps=3 is invalid: times are of 2 steps"),
        ("wan", ("--times", 0.5, 1), "times=(0.5, 1.0) is invalid"),
        ("wan", ("--solver", "plms"), "unknown solver 'plms'"),
        (
            "wan",
            ("--guidance-method", "cfg-zero-star", "--steps", 1),
            "zero_steps=1 is invalid: it must be below the number of steps",
        ),
        ("own", ("--skip-layers", 2), "skip_layers=(2,) is invalid: the model has 2 layers"),
        ("own", ("--guidance", 4, 3), "guidance={'text': (4.0, 3.0)} is invalid: this model has no second expert"),
        ("own", ("--guidance", 4, 3, 2), "--guidance: more than two numbers"),
        (
            "own",
            ("--guidance", "text=4", "motion=2"),
            "guidance of motion is invalid: the model has no such",
        ),
        ("own", ("--guidance-method", "apgs"), "guidance method 'apgs' is unknown; use one of apg, cfg"),
        ("wan", ("--strengths", "control=0.5"), "conditioning control is unknown to this model"),
        ("wan", ("--prompts", "image.json"), "method='trained' is invalid"),
        ("wan", ("--prompts", "noise.json"), "has shape (1, 4, 4, 4), not (1, 4, 5, 4)"),
    ],
)
def test_mistakes_are_named_before_weights_are_read(script, files, unread, monkeypatch, model, options, message):
    monkeypatch.chdir(files)
    prompt = PROMPT[:2] if "--size" in options else () if "--prompts" in options else PROMPT
    out = () if "--out" in options else ("--out", "clip.png")
    done = script(SAMPLE, model, *prompt, *options, *out)
    assert done.code == 2, done.err
    assert message in " ".join(done.err.split())
    assert not list(files.glob("clip.*"))
