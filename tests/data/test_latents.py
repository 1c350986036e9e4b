"""Cached latents: what is written is read, and only for the autoencoder that made it."""

import pickle

import ml_dtypes
import numpy as np
import pytest

from dit_video.data.latents import LatentExample, LatentSource, identity_hash, write_latents
from dit_video.errors import MissingError, UserError
from dit_video.tokens import Grid


def examples(count=3, channels=4):
    generator = np.random.default_rng(0)
    for index in range(count):
        latents = generator.standard_normal((index + 1, 2, 3, channels)).astype(np.float32)
        yield LatentExample(f"{index}.mp4", f"caption {index}", latents)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_round_trip(tmp_path, dtype):
    done = []
    write_latents(tmp_path / "l", examples(), identity={"weights": "abc"}, dtype=dtype, progress=done.append)
    source = LatentSource(tmp_path / "l", identity={"weights": "abc"})
    assert done == [1, 2, 3]
    assert len(source) == 3
    assert source.channels == 4
    assert source.sizes == (Grid(1, 2, 3), Grid(2, 2, 3), Grid(3, 2, 3))
    assert source.names == ("0.mp4", "1.mp4", "2.mp4")
    assert source.captions == ("caption 0", "caption 1", "caption 2")
    for index, example in enumerate(examples()):
        expected = example.latents
        if dtype == "bfloat16":
            expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert source[index].dtype == np.float32
        np.testing.assert_array_equal(source[index], expected)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[2], source[2])


def test_another_identity_is_refused(tmp_path):
    write_latents(tmp_path / "l", examples(), identity="autoencoder-1")
    with pytest.raises(UserError, match=r"autoencoder-1, autoencoder-2 was asked for"):
        LatentSource(tmp_path / "l", identity="autoencoder-2")
    assert LatentSource(tmp_path / "l").identity == "autoencoder-1"
    assert identity_hash({"a": 1, "b": 2}) == identity_hash({"b": 2, "a": 1}) != identity_hash({"a": 1, "b": 3})
    # Long identities are told apart by their hash.
    one, two = ({"configuration": "x" * 100, "step": step} for step in (1, 2))
    write_latents(tmp_path / "m", examples(), identity=one)
    with pytest.raises(UserError) as error:
        LatentSource(tmp_path / "m", identity=two)
    assert identity_hash(one) in str(error.value)
    assert identity_hash(two) in str(error.value)


def test_written_whole_or_not_at_all(tmp_path):
    def broken():
        yield from examples()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path / "l", broken(), identity="x")
    assert list(tmp_path.iterdir()) == []
    write_latents(tmp_path / "l", examples(), identity="x")
    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path / "l", broken(), identity="y")
    assert len(LatentSource(tmp_path / "l", identity="x")) == 3  # what was there stays
    write_latents(tmp_path / "l", examples(2), identity="y")
    assert len(LatentSource(tmp_path / "l", identity="y")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["l"]


def test_refusals(tmp_path):
    good = next(examples())
    with pytest.raises(UserError, match="no latents to write"):
        write_latents(tmp_path / "l", [], identity="x")
    bad = good._replace(name="bad.mp4", latents=np.full((1, 2, 3, 4), np.nan, np.float32))
    with pytest.raises(UserError, match=r"bad\.mp4 are not finite"):
        write_latents(tmp_path / "l", [good, bad], identity="x")
    bad = good._replace(name="bad.mp4", latents=np.zeros((1, 2, 3, 5), np.float32))
    with pytest.raises(UserError, match=r"bad\.mp4 have the shape \[1, 2, 3, 5\]"):
        write_latents(tmp_path / "l", [good, bad], identity="x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "letter.txt").write_text("keep")
    with pytest.raises(UserError, match="holds no latents"):
        write_latents(tmp_path, [good], identity="x")
    with pytest.raises(UserError, match="holds no latents"):
        LatentSource(tmp_path)
    with pytest.raises(MissingError):
        LatentSource(tmp_path / "nowhere")
    (tmp_path / "latents.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="version"):
        LatentSource(tmp_path)
