"""Cached latents: they are read as written, and only for their own autoencoder."""

import pickle
import re

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.core.storage import to_storage_path
from dit_video.data.latents.cache import LatentExample, LatentSource, Skipped, hash_identity
from dit_video.data.latents.writer import LatentWriter, write_latents
from dit_video.data.tables import Table
from dit_video.tokens import Field, Grid


def examples(count=3, channels=4):
    generator = np.random.default_rng(0)
    for index in range(count):
        latents = generator.standard_normal((index + 1, 2, 3, channels)).astype(np.float32)
        yield LatentExample(f"{index}.mp4", f"caption {index}", latents)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_latents_are_read_as_they_were_written(tmp_path, dtype):
    done = []
    write_latents(tmp_path / "l", examples(), identity={"weights": "abc"}, dtype=dtype, progress=done.append)
    source = LatentSource(tmp_path / "l", identity={"weights": "abc"})
    assert done == [1, 2, 3]
    assert len(source) == 3
    assert source.channels == 4
    assert [source.get_size(index) for index in range(3)] == [Grid(1, 2, 3), Grid(2, 2, 3), Grid(3, 2, 3)]
    assert source.sizes.tolist() == [[1, 2, 3], [2, 2, 3], [3, 2, 3]]
    assert source.names == ("0.mp4", "1.mp4", "2.mp4")
    assert source.all_captions == (("caption 0",), ("caption 1",), ("caption 2",))
    for index, example in enumerate(examples()):
        expected = example.latents
        if dtype == "bfloat16":
            expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert source[index].dtype == np.float32
        np.testing.assert_array_equal(source[index], expected)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[2], source[2])


def test_conditioning_latents_are_read_as_they_were_written(tmp_path):
    draw = np.random.default_rng(1)
    fields = (
        Field(name="cond_latents", alignment="grid", shape=(4,)),
        Field(name="image_tokens", alignment="sequence", shape=(6,), length=5),
        Field(name="action", alignment="frame", dtype="int32"),
        Field(name="camera", alignment="example", shape=(3, 4)),
    )

    def make_fields(one):
        return {
            "cond_latents": one.latents + 1,
            "image_tokens": draw.standard_normal((5, 6)).astype(np.float32),
            "action": 70_000 + np.arange(len(one.latents), dtype=np.int32),
            "camera": draw.standard_normal((3, 4)).astype(np.float32),
        }

    conditioned = [one._replace(fields=make_fields(one)) for one in examples()]
    write_latents(tmp_path / "l", conditioned, identity="x", fields=fields, dtype="float32")
    source = LatentSource(tmp_path / "l")
    assert source.fields == fields
    for index, one in enumerate(conditioned):
        np.testing.assert_array_equal(source[index], one.latents)
        latents, arrays = source.read_example(index)
        np.testing.assert_array_equal(latents, one.latents)
        assert arrays.keys() == one.fields.keys()
        for field in fields:
            np.testing.assert_array_equal(arrays[field.name], one.fields[field.name])
            assert arrays[field.name].dtype == field.dtype
    write_latents(tmp_path / "plain", examples(), identity="x")
    assert LatentSource(tmp_path / "plain").fields == ()
    for change, message in (
        ({}, None),
        ({"image_tokens": np.zeros((4, 6), np.float32)}, r"1\.mp4 has the shape \[4, 6\], not \[5, 6\]. Encode all"),
        ({"cond_latents": conditioned[0].fields["cond_latents"]}, r"cond_latents of 1\.mp4 has the shape"),
        ({"camera": np.full((3, 4), np.nan, np.float32)}, "not finite"),
    ):
        other = conditioned[1]._replace(fields=conditioned[1].fields | change if message else {})
        with pytest.raises(UserError, match=message or r"1\.mp4 has the fields none, but the data set has action"):
            write_latents(tmp_path / "m", [conditioned[0], other], identity="x", fields=fields)


def test_another_identity_is_refused(tmp_path):
    write_latents(tmp_path / "l", examples(), identity="autoencoder-1")
    with pytest.raises(UserError, match=r"autoencoder-1, but autoencoder-2 was requested"):
        LatentSource(tmp_path / "l", identity="autoencoder-2")
    assert LatentSource(tmp_path / "l").identity == "autoencoder-1"
    assert hash_identity({"a": 1, "b": 2}) == hash_identity({"b": 2, "a": 1}) != hash_identity({"a": 1, "b": 3})
    # Long identities are told apart by their hash, and of a mapping each part is compared that is asked for.
    long = {"autoencoder": {"configuration": "x" * 100, "step": 1}, "text": "encoder-1"}
    write_latents(tmp_path / "m", examples(), identity=long)
    assert len(LatentSource(tmp_path / "m", identity={"autoencoder": long["autoencoder"]})) == 3
    with pytest.raises(UserError) as error:
        LatentSource(tmp_path / "m", identity=long | {"autoencoder": {"configuration": "x" * 100, "step": 2}})
    result = re.findall(r"\(([0-9a-f]{16})\)", str(error.value))
    assert len(set(result)) == 2
    with pytest.raises(UserError, match="latents of text encoder-1, but encoder-2 was requested"):
        LatentSource(tmp_path / "m", identity=long | {"text": "encoder-2"})
    with pytest.raises(UserError, match="latents of other none, but x was requested"):
        LatentSource(tmp_path / "m", identity=long | {"other": "x"})


def test_a_cache_is_written_whole_or_not_at_all(tmp_path):
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


def test_unusable_caches_and_examples_are_refused(tmp_path):
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
    with pytest.raises(UserError, match=r"not a data set of latents, as it has no table\.json\. Encode"):
        LatentSource(tmp_path)
    with pytest.raises(MissingError):
        LatentSource(tmp_path / "nowhere")
    (tmp_path / "table.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match=r"table\.json is not of version .* Encode clips first"):
        LatentSource(tmp_path)


def test_every_caption_is_kept_and_views_are_grouped_by_their_clip(tmp_path):
    latents = np.ones((1, 2, 3, 4), np.float32)
    write_latents(
        tmp_path / "l",
        [
            LatentExample("a@0", ("one", "two"), latents, "a"),
            LatentExample("b@0", (), latents, "b"),
            LatentExample("a@4", ("one", "two"), latents, "a"),
            LatentExample("c", "three", latents),
        ],
        identity="x",
    )
    source = LatentSource(tmp_path / "l")
    assert source.all_captions == (("one", "two"), (), ("one", "two"), ("three",))
    assert source.clips == ("a", "b", "a", "c")
    assert source.groups.tolist() == [0, 1, 0, 2]
    assert (source.text_width, source.empty_text, source.skipped) == (0, None, ())


def test_embeddings_are_kept_with_their_lengths(tmp_path):
    draw = np.random.default_rng(0)
    texts = [tuple(draw.normal(size=(n, 5)).astype(np.float32) for n in lengths) for lengths in ((3, 1), (), (2,))]
    captions = [("a", "b"), (), ("c",)]
    latents = np.ones((1, 1, 1, 2), np.float32)
    rows = [LatentExample(f"{n}", captions[n], latents, "", texts[n]) for n in range(3)]
    writer = LatentWriter(folder=tmp_path / "l", identity="x", num_files=1, dtype="float32")
    writer.write(0, rows, [("", texts[2][0][:1])])
    assert writer.finish()
    source = LatentSource(tmp_path / "l")
    np.testing.assert_array_equal(source.empty_text, texts[2][0][:1])
    assert source.caption_counts.tolist() == [2, 0, 1]
    assert source.text_lengths.tolist() == [3, 1, 2]
    for index, of_example in enumerate(texts):
        for caption, expected in enumerate(of_example):
            np.testing.assert_array_equal(source.read_text(index, caption), expected)
    for wrong, message in (
        ((texts[0][0],), "2 captions and 1 embeddings"),
        ((texts[0][0], texts[0][1][:, :4]), r"shape \[1, 4\]"),
        ((texts[0][0], np.full((2, 5), np.nan, np.float32)), "finite"),
    ):
        with pytest.raises(UserError, match=message):
            write_latents(tmp_path / "m", [rows[0]._replace(text=wrong)], identity="x")


def write_three_files(folder):
    """Write three parts, one of which has no latents, out of order; return the examples."""
    files = LatentWriter(folder=to_storage_path(folder), identity="x", num_files=3, dtype="float32")
    first, *others = list(examples(5))
    of_file = [[first, others[0]], [Skipped("bad.mp4", "it is damaged", "ab", "bad")], others[1:]]
    for number in (2, 0, 1):
        assert not files.has_file(number)
        assert not files.finish()
        files.write(number, of_file[number])
        assert files.has_file(number)
    assert files.finish()
    return [*of_file[0], *of_file[2]]


def test_files_are_a_tfds_data_set_even_if_one_is_empty(tmp_path):
    expected = write_three_files(tmp_path / "l")
    records = tfds.builder_from_directory(tmp_path / "l").as_data_source("train")
    assert [record["name"].decode() for record in records] == [example.name for example in expected]
    source = LatentSource(tmp_path / "l")
    assert source.skipped == (Skipped("bad.mp4", "it is damaged", "ab", "bad"),)
    for index, example in enumerate(expected):
        np.testing.assert_array_equal(source[index], example.latents)


def test_latents_may_be_at_an_address(memory, tmp_path):
    address = f"{memory}/latents"
    expected = write_three_files(address)
    source = LatentSource(address, identity="x", cache=tmp_path / "cache")
    assert source.all_captions == tuple((example.captions,) for example in expected)
    for index, example in enumerate(expected):
        np.testing.assert_array_equal(source[index], example.latents)
    assert not list(tmp_path.rglob("*.array_record"))  # they are read in place
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[0], expected[0].latents)
    with pytest.raises(UserError, match="y was requested"):
        LatentSource(address, identity="y")
    # What is written there again is read again.
    to_storage_path(address).rmdir(recursive=True)
    files = LatentWriter(folder=to_storage_path(address), identity="y", num_files=1, dtype="float32")
    files.write(0, [example._replace(latents=example.latents + 1) for example in expected])
    assert files.finish()
    again = LatentSource(address, identity="y", cache=tmp_path / "cache")
    np.testing.assert_array_equal(again[3], expected[3].latents + 1)
    with pytest.raises(MissingError, match="no such data set: memory://bucket/nothing"):
        LatentSource(f"{memory}/nothing")
    with pytest.raises(UserError, match="other options"):
        LatentWriter(folder=to_storage_path(address), identity="y", num_files=1, dtype="bfloat16")
    # Further parts may be added, of which others wait until they are written.
    common = {"folder": to_storage_path(address), "identity": "y", "dtype": "float32"}
    assert not LatentWriter(num_files=3, plan_hash="a", **common).finish()
    more = LatentWriter(num_files=2, plan_hash="b", **common)  # of the other plan nothing was written
    more.write(1, [expected[0]._replace(name="more.mp4")])
    assert not more.finish()
    with pytest.raises(UserError, match=r"other options .* remove index/train-00001\.parquet and all after it"):
        LatentWriter(num_files=3, plan_hash="c", **common)
    np.testing.assert_array_equal(LatentSource(address)[3], expected[3].latents + 1)  # until then, what was there
    more.write(0, [])
    assert more.finish()
    assert LatentSource(address).names[-1] == "more.mp4"
    with pytest.raises(UserError, match="is an address"):
        write_latents(f"{memory}/more", examples(), identity="x")


def test_a_file_that_cannot_be_downloaded_is_not_taken_for_damaged(memory):
    write_three_files(f"{memory}/latents")
    source = LatentSource(f"{memory}/latents")
    source[0]
    file = to_storage_path(f"{memory}/latents/latents-train-00002.array_record")
    file.unlink()
    with pytest.raises(MissingError, match="no such file: memory://bucket/latents/latents-train"):
        source[3]


def test_a_damaged_record_is_named(tmp_path):
    write_latents(tmp_path / "l", examples(), identity="a")
    source = LatentSource(tmp_path / "l")
    whole = source[1]
    source.sizes = source.sizes * [[1], [2], [1]]
    with pytest.raises(DecodeError, match=r"1\.mp4 has .* values of latents, not .*into another folder"):
        source[1]
    file = next((tmp_path / "l").glob("*.array_record"))
    content = bytearray(file.read_bytes())
    content[100:400] = b"x" * 300
    file.write_bytes(content)
    damaged = LatentSource(tmp_path / "l")
    with pytest.raises(
        DecodeError, match=r"the record of \d\.mp4: .*array_record is damaged at .* into another folder"
    ):
        list(map(damaged.__getitem__, range(3)))
    assert whole.shape == (2, 2, 3, 4)


def test_8_bits_hold_every_channel_to_half_a_step(tmp_path):
    draw = np.random.default_rng(0)
    values = draw.standard_normal((3, 4, 5, 6)).astype(np.float32) * np.asarray([1e-6, 0.01, 1, 50, 3, 0], np.float32)
    text, field = values[0, 0, :4], Field(name="control", alignment="grid", shape=(2,))
    example = LatentExample("a", ("a caption",), values, fields={"control": values[..., 2:4]})
    sizes = {}
    for dtype in ("int8", "bfloat16", "float32"):
        writer = LatentWriter(folder=tmp_path / dtype, identity="x", num_files=1, dtype=dtype, fields=(field,))
        writer.write(0, [example], [(caption, text) for caption in ("a caption", "")])
        assert writer.finish()
        sizes[dtype] = Table(tmp_path / dtype, kind="latents")["length"][0]
    source = LatentSource(tmp_path / "int8")
    latents, fields = source.read_example(0)
    assert latents.dtype == np.float32
    steps = np.abs(values).max(axis=(0, 1, 2)) / 127
    assert (np.abs(latents - values) <= steps / 2 * (1 + 1e-5) + 1e-30).all()
    assert (np.abs(latents).max(axis=(0, 1, 2)) <= 127 * steps * (1 + 1e-5)).all()
    assert not latents[..., 5].any()
    # Fields and embeddings are in bfloat16.
    np.testing.assert_array_equal(fields["control"], LatentSource(tmp_path / "bfloat16").read_example(0)[1]["control"])
    np.testing.assert_allclose(source.read_text(0), LatentSource(tmp_path / "float32").read_text(0), rtol=1e-2)
    assert sizes["int8"] < sizes["bfloat16"] < sizes["float32"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[0], latents)
