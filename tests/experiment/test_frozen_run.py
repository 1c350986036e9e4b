"""A run with a frozen text encoder, from clips to samples, with cached embeddings or without."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import dit_video
from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.data.clips import ClipSource
from dit_video.data.latents.cache import LatentSource
from dit_video.experiment.run import Run
from dit_video.models.encoders import FrozenTextConfig
from dit_video.sampling.loading import load_pipeline
from dit_video.tokens import Grid
from dit_video.training.hooks import logging
from dit_video.weights import load_embedder
from support import tiny_clip
from support.fakes import FakeEmbedder, use_fake_embedder
from support.latents import generate_latents

pytestmark = pytest.mark.usefixtures("opened")
PROMPT, SIZE = "a red circle moving left", (5, 16, 16)


@pytest.fixture
def opened(monkeypatch):
    """Return the list of opened encoders, all of which are fakes."""
    return use_fake_embedder(monkeypatch)


def experiment(tiny, folder, **data):
    """Return the tiny experiment with a frozen text encoder."""
    text = FrozenTextConfig(folder=str(folder), width=8, max_tokens=6)
    backbone = tiny.EXPERIMENT.model.backbone.replace(context_width=8)
    frozen = tiny.EXPERIMENT.replace_model(text_encoder=text, backbone=backbone)
    return dataclasses.replace(frozen, data=dataclasses.replace(frozen.data, **data))


def start(folder, experiment, tiny_run):
    """Return a run that has its clips and its autoencoder."""
    begun = Run.create(folder, experiment)
    begun.take((tiny_run / "data").resolve())
    (folder / "autoencoder").mkdir()
    shutil.copy(tiny_run / "autoencoder" / "weights.safetensors", folder / "autoencoder")
    return begun


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "seed.txt").write_text("1")
    return folder


@pytest.fixture(scope="module")
def frozen_run(tiny, tiny_run, encoder, tmp_path_factory):
    """Return the folder of a finished run, to be read only."""
    folder = tmp_path_factory.mktemp("frozen") / "run"
    with pytest.MonkeyPatch.context() as patch:
        opened = use_fake_embedder(patch)
        start(folder, experiment(tiny, encoder), tiny_run).run_stages()
        assert len(opened) == 1, "its weights are read once"
    return folder


@pytest.fixture
def copy(frozen_run, tmp_path):
    """Return a copy of the run that a test may change."""
    return shutil.copytree(frozen_run, tmp_path / "run", symlinks=True)


@pytest.mark.slow
def test_latents_are_stored_with_the_embeddings_of_their_captions(frozen_run, encoder):
    latents, embedder = LatentSource(frozen_run / "latents"), FakeEmbedder(encoder, max_tokens=6)
    assert latents.identity["text"] == embedder.identity
    np.testing.assert_allclose(latents.empty_text, embedder(""), rtol=2**-8)
    for example, captions in enumerate(latents.all_captions):
        for number, caption in enumerate(captions):
            np.testing.assert_allclose(latents.read_text(example, number), embedder(caption), rtol=2**-8)
    losses = [entry["loss"] for entry in logging.read_metrics(frozen_run / "denoiser" / "metrics.jsonl")]
    assert np.isfinite(losses).all()
    assert not (frozen_run / "texts").exists()


@pytest.mark.slow
def test_a_run_with_cached_embeddings_continues_without_the_encoder_bit_for_bit(frozen_run, copy, opened):
    shutil.rmtree(copy / "pipeline")
    for checkpoint in (copy / "denoiser" / "checkpoints").iterdir():
        if int(checkpoint.name) > 4:
            shutil.rmtree(checkpoint)
    Run.open(copy).run_stages()
    for name in ("denoiser.safetensors", "pipeline.json"):
        assert (copy / "pipeline" / name).read_bytes() == (frozen_run / "pipeline" / name).read_bytes()
    assert opened == []


@pytest.mark.slow
def test_a_pipeline_opens_the_encoder_at_the_first_prompt(frozen_run, encoder, tmp_path, opened):
    pipeline = dit_video.load(frozen_run)
    assert opened == []
    text = pipeline.config.model.text_encoder
    assert (text.folder, text.identity) == (str(encoder), FakeEmbedder(encoder, max_tokens=6).identity)
    latents = generate_latents(pipeline, PROMPT, size=SIZE)
    assert len(opened) == 1
    other = generate_latents(pipeline, "a blue square", size=SIZE)
    assert np.abs(latents - other).max() > 1e-3
    # The saved pipeline gives the same, even after the encoder has moved.
    pipeline.save(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "pipeline.json").read_text())["config"]["model"]
    assert written["text_encoder"] == config_json.to_json(text)
    moved = shutil.copytree(encoder, tmp_path / "moved")
    for again in (dit_video.load(tmp_path / "saved"), dit_video.load(tmp_path / "saved", text_encoder=moved)):
        np.testing.assert_array_equal(generate_latents(again, PROMPT, size=SIZE), latents)
    assert pipeline.count_parameters()["text"] == 0


@pytest.mark.slow
def test_prompts_are_embedded_once(frozen_run, opened):
    from dit_video import Request

    dit_video.load(frozen_run).generate_many([Request(PROMPT, Grid(*SIZE), seed=seed) for seed in range(3)])
    assert sorted(opened[0].texts) == ["", PROMPT]


@pytest.mark.slow
def test_a_pipeline_refuses_another_encoder(frozen_run, tiny_run, encoder, tmp_path):
    (tmp_path / "seed.txt").write_text("2")
    pipeline = load_pipeline(frozen_run / "pipeline", text_encoder=tmp_path)
    result, expected = (FakeEmbedder(folder, max_tokens=6).identity for folder in (tmp_path, encoder))
    with pytest.raises(UserError, match=f"holds the text encoder {result}, {expected} was asked for"):
        pipeline.generate(PROMPT, size=SIZE)
    with pytest.raises(UserError, match="the text encoder was trained with the denoiser"):
        dit_video.load(tiny_run, text_encoder=encoder)


@pytest.mark.slow
def test_an_unfinished_run_can_be_sampled_with_a_moved_encoder(frozen_run, copy, encoder, tmp_path, opened):
    shutil.rmtree(copy / "pipeline")
    moved = shutil.copytree(encoder, tmp_path / "moved")
    latents = generate_latents(dit_video.load(copy, text_encoder=moved), PROMPT, size=SIZE)
    assert len(opened) == 1
    expected = generate_latents(dit_video.load(frozen_run), PROMPT, size=SIZE)
    np.testing.assert_array_equal(latents, expected)


@pytest.mark.nightly
def test_latents_of_another_encoder_or_of_none_are_refused(tiny, tiny_run, frozen_run, tmp_path):
    (tmp_path / "seed.txt").write_text("2")
    begun = start(tmp_path / "run", experiment(tiny, tmp_path), tiny_run)
    shutil.copytree(frozen_run / "latents", tmp_path / "run" / "latents")
    identities = LatentSource(frozen_run / "latents").identity["text"], FakeEmbedder(tmp_path, max_tokens=6).identity
    with pytest.raises(UserError, match="holds latents of text {}, but {} was requested".format(*identities)) as error:
        begun.run_stages()
    assert "\n" not in str(error.value)
    shutil.rmtree(tmp_path / "run" / "latents")
    shutil.copytree(tiny_run / "latents", tmp_path / "run" / "latents")
    with pytest.raises(UserError, match=f"holds latents of text none, but {identities[1]} was requested"):
        begun.run_stages()


@pytest.mark.slow
def test_captions_of_clips_without_a_cache_are_embedded_and_kept(tiny, tiny_run, encoder, tmp_path, opened):
    begun = start(tmp_path / "run", experiment(tiny, encoder, cache_latents=False), tiny_run)
    begun.run_stages()
    assert begun.load_pipeline().denoiser_params["text"] == {}
    assert opened[-1].cache == tmp_path / "run" / "texts"
    captions = {caption for info in begun.training_clips.infos for caption in info.captions}
    assert set(opened[-1].texts) == {"", *captions}
    assert not (tmp_path / "run" / "latents").exists()


def test_a_frozen_encoder_with_the_wrong_width_or_too_many_tokens_is_refused(tiny):
    frozen = experiment(tiny, "encoder")
    assert config_json.from_json(json.loads(json.dumps(config_json.to_json(frozen)))) == frozen
    wide = dataclasses.replace(frozen.model.text_encoder, width=16)
    with pytest.raises(UserError, match=r"Use backbone.context_width=16"):
        frozen.replace_model(text_encoder=wide)
    long = dataclasses.replace(frozen.model.text_encoder, max_tokens=512)
    with pytest.raises(UserError, match=r"Use text_encoder.max_tokens=96 or less"):
        frozen.replace_model(text_encoder=long)


def test_the_encode_tool_stores_embeddings_of_a_named_encoder(tiny, tiny_run, encoder, tmp_path, script, monkeypatch):
    """The command names the encoder, because the run trains its own together with the denoiser."""
    from dit_video import weights

    monkeypatch.setattr(weights, "load_embedder", FakeEmbedder)
    tool, data = "tools/encode_latents.py", (tiny_run / "data").resolve()
    done = script(tool, tiny_run, data, tmp_path / "l", "--text-encoder", encoder, "--max-text-tokens", 3)
    assert done.code == 0, done.err
    embedder, latents = FakeEmbedder(encoder, max_tokens=3), LatentSource(tmp_path / "l")
    assert latents.identity["text"] == embedder.identity
    assert set(latents.text_lengths.tolist()) == {3}
    np.testing.assert_allclose(latents.read_text(0), embedder(latents.all_captions[0][0]), rtol=2**-8)
    assert len(ClipSource(data)) == tiny.COUNT
    refused = script(tool, tiny_run, data, tmp_path / "m", "--max-text-tokens", 3)
    assert refused.code == 2
    assert "needs --text-encoder; use both" in refused.err


@pytest.mark.filterwarnings("ignore:a text of")
@pytest.mark.slow
def test_the_encode_tool_stores_embeddings_of_a_clip_text_encoder(tiny_run, tmp_path, script):
    tiny_clip.write_clip(tmp_path / "clip")
    tiny_clip.write_tokenizer(tmp_path / "clip")
    data = (tiny_run / "data").resolve()
    done = script("tools/encode_latents.py", tiny_run, data, tmp_path / "l", "--text-encoder", tmp_path / "clip")
    assert done.code == 0, done.err
    embedder, latents = load_embedder(tmp_path / "clip"), LatentSource(tmp_path / "l")
    assert latents.identity["text"] == embedder.identity
    assert latents.text_lengths.max() == tiny_clip.TEXT.positions
    np.testing.assert_allclose(latents.read_text(0), embedder(latents.all_captions[0][0]), rtol=2**-8, atol=2**-8)


@pytest.mark.nightly
def test_the_encode_tool_makes_the_latents_of_a_run_with_a_frozen_encoder(frozen_run, copy, tmp_path, script, opened):
    shutil.rmtree(copy / "latents")
    done = script("tools/encode_latents.py", copy, copy / "data", copy / "latents")
    assert done.code == 0, done.err
    assert LatentSource(copy / "latents").identity == LatentSource(frozen_run / "latents").identity
    done = script("tools/encode_latents.py", frozen_run / "pipeline", copy / "data", tmp_path / "l")
    assert done.code == 0, done.err
    assert LatentSource(tmp_path / "l").text_width == 8
    assert len(opened) == 2
