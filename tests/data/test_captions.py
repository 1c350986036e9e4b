"""Captions of rows: all lengths at once, texts one at a time."""

import contextlib
import pickle

import jax
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.storage import to_storage_path
from dit_video.data.captions import CaptionSource, EmbeddedCaptions, TokenizedCaptions
from dit_video.data.latents.cache import CachedCaptions, LatentExample, LatentSource
from dit_video.data.latents.writer import LatentWriter, write_latents
from dit_video.data.tables import Table, compute_row_id
from dit_video.tokens import PackedShape
from support.example_tables import open_latents
from support.fakes import FakeEmbedder, tokenize

CAPTIONS = [("a red ball", "it"), (), ("a blue box moves",), ("", "it")] * 5


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "seed.txt").write_text("1")
    return FakeEmbedder(folder)


def write_cache(folder, embedder, *, identity="t", captions=CAPTIONS):
    """Write latents whose values are the example's number, with the embeddings of the captions."""

    def examples():
        for number, of_example in enumerate(captions):
            latents = np.full((1 + 2 * (number % 2), 4, 4, 2), number, np.float32)
            yield LatentExample(f"{number}.mp4", of_example, latents, text=tuple(map(embedder, of_example)))

    stamp = {"autoencoder": "a", "text": identity}
    made = LatentWriter(folder=to_storage_path(folder), identity=stamp, num_files=1, dtype="float32")
    made.write(0, examples(), [("", embedder(""))])
    made.finish()
    return LatentSource(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory, embedder):
    return write_cache(tmp_path_factory.mktemp("cached") / "latents", embedder)


def test_all_kinds_know_the_lengths_and_read_any_caption(source, embedder):
    assert embedder("a red ball").shape == (4, 8)
    for texts, text_of in (
        (TokenizedCaptions(CAPTIONS, tokenize), tokenize),
        (CachedCaptions(source), embedder),
        (EmbeddedCaptions(CAPTIONS, embedder.embed_many, identity="t"), embedder),
    ):
        assert isinstance(texts, CaptionSource)
        np.testing.assert_array_equal(texts.empty, text_of(""))
        assert texts.width == (0 if texts.empty.ndim == 1 else 8)
        for example, captions in enumerate(CAPTIONS):
            assert len(texts.lengths[example]) == len(captions or ("",))
            for number, caption in enumerate(captions or ("",)):
                np.testing.assert_array_equal(texts.read(example, number), text_of(caption))
                assert texts.lengths[example][number] == len(text_of(caption))


def test_identities_tell_captions_apart(source, embedder, tmp_path):
    def join_hash_bytes(texts):
        return b"".join(texts.iter_hash_bytes())

    others = [*CAPTIONS[:-1], ("something else",)]
    first = join_hash_bytes(CachedCaptions(source))
    assert join_hash_bytes(CachedCaptions(write_cache(tmp_path / "same", embedder))) == first
    assert join_hash_bytes(CachedCaptions(write_cache(tmp_path / "identity", embedder, identity="u"))) != first
    assert join_hash_bytes(CachedCaptions(write_cache(tmp_path / "captions", embedder, captions=others))) != first
    identities = [
        join_hash_bytes(EmbeddedCaptions(captions, embedder.embed_many, identity=identity))
        for captions, identity in ((CAPTIONS, "t"), (CAPTIONS, "u"), (others, "t"), (CAPTIONS, "t"))
    ]
    assert len(set(identities)) == 3
    assert identities[0] == identities[3]


def test_each_different_caption_is_embedded_once_for_its_length(embedder):
    embedder.texts.clear()
    done = []
    texts = EmbeddedCaptions(CAPTIONS, embedder.embed_many, identity="t", progress=done.append)
    assert embedder.texts == ["", "", "a red ball", "it", "a blue box moves"]
    assert done == [4]
    # Worker processes get the lengths alone: an encoder on a device can't go there.
    copy = pickle.loads(pickle.dumps(EmbeddedCaptions(CAPTIONS, lambda many: embedder.embed_many(many), identity="t")))
    np.testing.assert_array_equal(copy.lengths.values, texts.lengths.values)


def test_a_tokenizer_knows_the_lengths_without_the_encoder(embedder):
    by_encoder = EmbeddedCaptions(CAPTIONS, embedder.embed_many, identity="t")
    embedder.texts.clear()
    count = lambda caption: len(caption.split()) + 1  # noqa: E731
    texts = EmbeddedCaptions(CAPTIONS, embedder.embed_many, identity="t", count_tokens=count)
    assert embedder.texts == [""]
    np.testing.assert_array_equal(texts.lengths.values, by_encoder.lengths.values)
    assert b"".join(texts.iter_hash_bytes()) == b"".join(by_encoder.iter_hash_bytes())


def test_lengths_are_those_of_every_example(embedder):
    lengths = TokenizedCaptions(CAPTIONS, tokenize).lengths
    expected = [[len(tokenize(caption)) for caption in captions or ("",)] for captions in CAPTIONS]
    assert [lengths[example].tolist() for example in range(len(lengths))] == expected
    assert lengths.longest.tolist() == list(map(max, expected))


def test_pickled_captions_are_small_and_read_the_same():
    captions = [(f"caption {number}",) * (number % 3) for number in range(5000)]
    texts = TokenizedCaptions(captions, tokenize)
    content = pickle.dumps(texts)
    assert len(content) < 5000
    copy = pickle.loads(content)
    for example in (0, 1, 4999):
        np.testing.assert_array_equal(copy.read(example, 0), tokenize((*captions[example], "")[0]))


def take_rows(source, captions, **options):
    shape = PackedShape(tokens=16, text=24, segments=4)
    with contextlib.closing(open_latents(source, captions, shape=shape, batch=2, **options)) as rows:
        return [next(rows) for _ in range(6)], rows


def assert_equal(one, other):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.nightly
def test_rows_hold_the_embeddings_of_their_examples(source, embedder):
    result, batches = take_rows(source, CachedCaptions(source))
    drawn = set()
    for rows in result:
        assert rows.text.shape == (2, 24, 8)
        for row, segment in zip(*np.nonzero(rows.valid), strict=True):
            example = int(rows.tokens[row][rows.segments[row] == segment + 1][0, 0])
            text = rows.text[row][rows.text_segments[row] == segment + 1]
            captions = CAPTIONS[example] or ("",)
            caption = next(caption for caption in captions if np.array_equal(text, embedder(caption)))
            drawn.add((example % 4, caption))
        assert not rows.text[rows.text_segments == 0].any()
    assert drawn == {(number, caption) for number in range(4) for caption in CAPTIONS[number] or ("",)}
    # From the encoder, from the middle, and by worker processes the same.
    live, _ = take_rows(source, EmbeddedCaptions(CAPTIONS, embedder.embed_many, identity="t"))
    resumed, again = take_rows(source, CachedCaptions(source), start=2, workers=1)
    for one, other in (*zip(result, live, strict=True), *zip(result[2:], resumed[:4], strict=True)):
        assert_equal(one, other)
    assert again.hash == batches.hash


def test_a_plan_of_the_same_lengths_is_another_one_with_another_encoder(source, embedder, tmp_path):
    other = write_cache(tmp_path / "l", embedder, identity="u")
    assert take_rows(source, CachedCaptions(source))[1].hash != take_rows(other, CachedCaptions(other))[1].hash


def test_an_example_whose_text_is_damaged_keeps_its_place_and_does_not_count(embedder, tmp_path, caplog):
    source = write_cache(tmp_path / "l", embedder)
    whole, _ = take_rows(source, CachedCaptions(source))
    texts = Table(tmp_path / "l" / "texts", kind="texts")
    row = texts["id"].tolist().index(compute_row_id("a blue box moves"))
    with (tmp_path / "l" / "texts" / "texts-train-00000.array_record").open("r+b") as file:
        file.seek(int(texts["offset"][row]) + int(texts["length"][row]) // 2)
        file.write(b"\x7f" * 8)
    result, _ = take_rows(source, CachedCaptions(source))
    lost = 0
    for rows, expected in zip(result, whole, strict=True):
        np.testing.assert_array_equal(rows.segments, expected.segments)
        for row, segment in zip(*np.nonzero(expected.valid & ~rows.valid), strict=True):
            assert expected.tokens[row][expected.segments[row] == segment + 1][0, 0] % 4 == 2  # those of this caption
            lost += 1
    assert lost >= 5
    assert "2.mp4 is damaged and does not count in the loss: the embedding of a caption of 2.mp4: " in caplog.text


def test_latents_without_embeddings_are_refused(tmp_path):
    write_latents(tmp_path / "l", [LatentExample("a", "a", np.ones((1, 2, 2, 2), np.float32))], identity="x")
    with pytest.raises(UserError, match="holds no embeddings of captions; encode the clips with a text encoder"):
        CachedCaptions(LatentSource(tmp_path / "l"))
