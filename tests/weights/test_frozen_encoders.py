"""Opening of text encoders: frozen ones are opened late, once, and only the requested one."""

import dataclasses
import json

import numpy as np
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.models.encoders import ByteEncoderConfig, ByteTokenizer, FrozenTextConfig
from dit_video.weights import load_embedder
from dit_video.weights.frozen_encoders import (
    FrozenImageEncoder,
    FrozenTextEncoder,
    check_width,
    open_tokenizer,
    set_encoder_folder,
)
from support import tiny_clip
from support.fakes import FakeEmbedder, use_fake_embedder
from support.tiny_t5 import CONFIG as TINY_T5
from support.tiny_t5 import write_encoder, write_tokenizer

CONFIG = FrozenTextConfig(folder="set by the fixture", width=8, max_tokens=5)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Return the config of an encoder in a folder."""
    use_fake_embedder(monkeypatch)
    (tmp_path / "seed.txt").write_text("1")
    return set_encoder_folder(CONFIG, tmp_path)


def test_a_frozen_encoder_is_opened_at_the_first_text(config, tmp_path):
    encoder = FrozenTextEncoder(config)
    (tmp_path / "seed.txt").write_text("2")  # not read yet
    expected = FakeEmbedder(tmp_path, max_tokens=5)
    np.testing.assert_array_equal(encoder("a red ball"), expected("a red ball"))
    assert encoder("word " * 20).shape == (5, 8)
    assert [len(values) for values in encoder.encode_many(["", "one two"])] == [1, 3]
    assert encoder.identity == encoder.pinned_config.identity == expected.identity
    (tmp_path / "seed.txt").unlink()
    encoder("still open")


def test_another_encoder_is_refused(config, tmp_path):
    pinned = FrozenTextEncoder(config).pinned_config
    (tmp_path / "seed.txt").write_text("2")
    other = FakeEmbedder(tmp_path, max_tokens=5).identity
    encoder = FrozenTextEncoder(pinned)
    assert encoder.identity == pinned.identity  # known without opening it
    with pytest.raises(UserError, match=f"holds the text encoder {other}, {pinned.identity} was asked for") as error:
        encoder("a red ball")
    assert "\n" not in str(error.value)


def test_another_width_is_refused(config):
    narrow = FrozenTextConfig(folder=config.folder, width=4)
    with pytest.raises(UserError, match="embeddings of width 8, the config says 4; set text width=8"):
        FrozenTextEncoder(narrow)("a red ball")


def test_a_t5_is_opened_from_its_folder(tmp_path):
    write_encoder(tmp_path / "t5")
    write_tokenizer(tmp_path / "t5")
    config = FrozenTextConfig(folder=str(tmp_path / "t5"), width=TINY_T5.width, max_tokens=8)
    check_width(config)
    encoder, expected = (
        FrozenTextEncoder(config, cache=tmp_path / "cache"),
        load_embedder(tmp_path / "t5", max_tokens=8),
    )
    np.testing.assert_array_equal(encoder("a red ball"), expected("a red ball"))
    assert encoder.identity == expected.identity
    assert list((tmp_path / "cache").rglob("*.npy"))
    (tmp_path / "t5" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"embeddings of width {TINY_T5.width}, the config says 8; set text width="):
        check_width(dataclasses.replace(config, width=8))


def test_a_clip_encoder_is_opened_from_its_folder(tmp_path):
    tiny_clip.write_clip(tmp_path)
    tiny_clip.write_tokenizer(tmp_path)
    config = FrozenTextConfig(folder=str(tmp_path), width=tiny_clip.TEXT.width, max_tokens=12)
    check_width(config)
    encoder = FrozenTextEncoder(config)
    np.testing.assert_array_equal(encoder("red ball"), load_embedder(tmp_path)("red ball"))
    with pytest.raises(UserError, match=r"max_tokens=512 .* has 12 positions.* max_tokens=12"):
        FrozenTextEncoder(dataclasses.replace(config, max_tokens=512))("red ball")


def test_encoders_that_are_missing_say_what_helps(tmp_path):
    config = FrozenTextConfig(folder=str(tmp_path / "text_encoder"), width=8)
    images = FrozenImageEncoder(tmp_path / "image_encoder")
    for read, fix in (
        (lambda: FrozenTextEncoder(config)("a red ball"), r"text_encoder=FOLDER \(--text-encoder FOLDER\)"),
        (lambda: images.shape, r"image_encoder=FOLDER \(--image-encoder FOLDER\)"),
        (lambda: images(np.zeros((1, 8, 8, 3), np.uint8)), r"image_encoder=FOLDER \(--image-encoder FOLDER\)"),
    ):
        with pytest.raises(MissingError, match=rf"no such file: .*_encoder/config\.json\. If the .* moved, use {fix}"):
            read()


def test_the_identity_is_stored_in_a_file(config, tmp_path):
    kept = tmp_path / "run" / "text_encoder.json"
    first = open_tokenizer(config, identity_file=kept)
    assert json.loads(kept.read_text()) == {"identity": first.identity}
    (tmp_path / "seed.txt").write_text("2")
    again = open_tokenizer(config, identity_file=kept, cache=tmp_path / "cache")
    assert again.identity == first.identity
    with pytest.raises(UserError, match="was asked for"):
        again("a red ball")


def test_a_trained_encoder_has_a_tokenizer_and_no_folder(tmp_path):
    trained = ByteEncoderConfig(width=8, heads=2, max_tokens=8)
    assert isinstance(open_tokenizer(trained, identity_file=tmp_path / "text_encoder.json"), ByteTokenizer)
    assert not (tmp_path / "text_encoder.json").exists()
    with pytest.raises(UserError, match="was trained with the denoiser; leave out text_encoder=/there"):
        set_encoder_folder(trained, "/there")
