"""Batches of one size each: clips are resized to cover their bucket and cropped to it, and none is lost."""

import contextlib

import jax
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.shared_array import SharedStrings
from dit_video.data.buckets import BatchMemory, BucketConfig, plan_buckets
from dit_video.data.captions import EmbeddedCaptions, TokenizedCaptions
from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.data.examples import ExampleTable
from dit_video.data.ingest.engine import ingest
from dit_video.data.rows import load_rows
from dit_video.data.sizes import SizeLimits, fit_size
from dit_video.data.sources import ClipExamples, OnlineEncoding, compute_clip_grids, compute_covering_size
from dit_video.scenes import shapes
from dit_video.tokens import Grid, compute_positions, compute_token_grid, unpatchify
from support.fakes import FakeEmbedder, average_patches, tokenize

PATCH = Grid(1, 2, 2)
LIMITS = SizeLimits(max_pixels=32 * 48, max_frames=9, multiple=Grid(4, 16, 16))
SIZES = (Grid(17, 32, 32), Grid(9, 32, 48), Grid(9, 48, 32), Grid(1, 32, 32))
TEXT = 40


def get_latent_grid(size):
    return Grid(1 + (size.t - 1) // 4, size.h // 8, size.w // 8)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("buckets")
    shapes.write_folder(folder / "clips", count=24, seed=0, sizes=SIZES)
    ingest(folder / "clips", folder / "data")
    return ClipSource(folder / "data")


@pytest.fixture(scope="module")
def buckets(clips):
    return plan_buckets(
        np.asarray([fit_size(info, LIMITS) for info in clips.infos]),
        BatchMemory(fixed=0, per_token=1),
        budget=36,
        count=3,
        text=TEXT,
        devices=2,
        to_tokens=lambda size: compute_token_grid(get_latent_grid(size), PATCH),
    )


def take_batches(clips, buckets, count, encode=average_patches, captions=None, columns=None, **options):
    stride = Grid(4, 8, 8)
    table = ExampleTable(
        names=SharedStrings(clips.column("name")),
        grids=compute_clip_grids(clips, LIMITS, stride=stride, patch=PATCH),
        captions=captions or TokenizedCaptions(clips.column("captions"), tokenize),
        **columns or {},
    )
    encoding = OnlineEncoding(encode=encode, limits=LIMITS, stride=stride, channels=3, patch=PATCH)
    with contextlib.closing(load_rows(ClipExamples(clips, table, encoding), buckets, seed=0, **options)) as rows:
        return [next(rows) for _ in range(count)], rows


def test_coordinates_along_time_are_in_seconds(clips, buckets):
    counted, _ = take_batches(clips, buckets, 3)
    timed, _ = take_batches(clips, buckets, 3, columns={"token_dt": np.full(len(clips), 0.5)})
    for rows, same in zip(counted, timed, strict=True):
        np.testing.assert_array_equal(same.positions, rows.positions * np.float32([0.5, 1, 1]))
    led, _ = take_batches(clips, buckets, 3, columns={"token_dt": np.full(len(clips), 0.5), "token_lead": 0.5})
    assert {time for rows in led for time in rows.positions[..., 0].flat} == {0.0, 0.25, 0.75}
    assert any(rows.positions[..., 0].any() for rows in counted)


def test_a_batch_has_one_size_and_no_padding(clips, buckets):
    result, batches = take_batches(clips, buckets, 20)
    sizes = {compute_token_grid(get_latent_grid(bucket.size), PATCH): bucket.batch for bucket in buckets.buckets}
    seen = set()
    for rows in result:
        grid = next(grid for grid in sizes if grid.volume == rows.tokens.shape[1])
        assert len(rows.tokens) == sizes[grid]
        assert (rows.segments == 1).all()
        assert rows.valid.all()
        np.testing.assert_array_equal(rows.positions[0], compute_positions(grid))
        for row in range(len(rows.tokens)):
            caption = bytes((rows.text[row][rows.text_segments[row] == 1] - 3).astype(np.uint8)).decode()
            shapes.parse_caption(caption)
        seen |= set(rows.examples[:, 0].tolist())
    assert len(seen) == sum(len(rows.examples) for rows in result)  # running numbers: none comes twice
    summary = batches.summarize(devices=1)
    assert sum(bucket["examples"] for bucket in summary["buckets"]) == summary["examples"] == 24
    assert summary["dropped"] == 0
    assert "0 dropped" in str(batches)


def test_clips_show_the_colour_of_their_caption(clips, buckets):
    """Latents and captions belong to the same clip."""
    for rows in take_batches(clips, buckets, 8)[0]:
        grid = next(
            compute_token_grid(get_latent_grid(bucket.size), PATCH)
            for bucket in buckets.buckets
            if compute_token_grid(get_latent_grid(bucket.size), PATCH).volume == rows.tokens.shape[1]
        )
        for tokens, text in zip(rows.tokens, rows.text, strict=True):
            caption = bytes((text[text > 0] - 3).astype(np.uint8)).decode()
            picture = unpatchify(tokens, grid, PATCH)
            light = (picture - np.asarray(shapes.BACKGROUND)).reshape(-1, 3).max(axis=0)
            requested = np.asarray(shapes.COLOURS[shapes.parse_caption(caption).colour], np.float64) - shapes.BACKGROUND
            assert light @ requested / np.linalg.norm(light) / np.linalg.norm(requested) > 0.95


@pytest.mark.slow
def test_resumed_and_shared_batches_are_the_same(clips, buckets):
    whole = take_batches(clips, buckets, 6)[0]
    resumed = take_batches(clips, buckets, 2, start=4)[0]
    # The second host decodes clip by clip, in a process of its own.
    own = ({}, {"workers": 1, "ahead_bytes": 1})
    shares = [take_batches(clips, buckets, 6, host=host, hosts=2, **own[host])[0] for host in range(2)]
    for step, rows in enumerate(whole):
        both = jax.tree.map(lambda *parts: np.concatenate(parts), *(share[step] for share in shares))
        jax.tree.map(np.testing.assert_array_equal, both, rows)
        if step >= 4:
            jax.tree.map(np.testing.assert_array_equal, resumed[step - 4], rows)


@pytest.mark.nightly
def test_embeddings_take_the_places_of_token_ids(clips, buckets, tmp_path):
    (tmp_path / "seed.txt").write_text("1")
    embedder, captions = FakeEmbedder(tmp_path), [info.captions for info in clips.infos]
    ids, plain = take_batches(clips, buckets, 4)
    # Its encoder can't be pickled to the workers, which don't need it.
    embedded = EmbeddedCaptions(captions, lambda many: embedder.embed_many(many), identity="t")
    result, batches = take_batches(clips, buckets, 4, captions=embedded, workers=1)
    for rows, expected in zip(result, ids, strict=True):
        np.testing.assert_array_equal(rows.tokens, expected.tokens)
        assert rows.text.shape == (*expected.text.shape, 8)
        for text, segments, words in zip(rows.text, rows.text_segments, expected.text, strict=True):
            caption = bytes((words[words > 0] - 3).astype(np.uint8)).decode()
            np.testing.assert_array_equal(text[segments == 1], embedder(caption))
            assert not text[segments == 0].any()
    assert batches.hash != plain.hash
    other = EmbeddedCaptions(captions, embedder.embed_many, identity="u")
    assert take_batches(clips, buckets, 0, captions=other)[1].hash != batches.hash


def test_a_damaged_clip_is_masked(clips, buckets, monkeypatch):
    whole = take_batches(clips, buckets, 12)[0]
    damaged, read = clips.infos[5].name, ClipSource.__getitem__
    monkeypatch.setattr(
        ClipSource, "__getitem__", lambda self, index: b"x" if self.infos[index].name == damaged else read(self, index)
    )
    result = take_batches(clips, buckets, 12)[0]
    assert sum((~rows.valid).sum() for rows in result) >= 1
    for one, other in zip(whole, result, strict=True):
        assert one.tokens.shape == other.tokens.shape
        np.testing.assert_array_equal(one.tokens[other.valid[:, 0]], other.tokens[other.valid[:, 0]])
        assert not other.tokens[~other.valid[:, 0]].any()


def test_all_rows_of_a_batch_without_readable_clips_are_masked(clips, buckets, monkeypatch):
    monkeypatch.setattr(ClipSource, "__getitem__", lambda self, index: b"x")
    for rows, whole in zip(take_batches(clips, buckets, 3)[0], take_batches(clips, buckets, 3)[0], strict=True):
        assert not rows.valid.any()
        assert rows.tokens.shape == whole.tokens.shape


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (33, 1000), (100, 100)])
def test_a_clip_covers_its_bucket_and_keeps_its_aspect_ratio(height, width):
    info = ClipInfo("a", (), height, width, 9, 8.0, 1.0)
    for size in (Grid(9, 32, 32), Grid(9, 32, 48), Grid(1, 16, 96)):
        rows, columns = compute_covering_size(info, size)
        assert rows >= size.h
        assert columns >= size.w
        assert rows == size.h or columns == size.w
        assert rows / columns == pytest.approx(height / width, rel=0.04)


def test_a_budget_that_the_state_alone_exceeds_is_refused():
    with pytest.raises(UserError, match="budget=100 is invalid: the state alone takes 100 bytes"):
        BucketConfig(memory=BatchMemory(fixed=100, per_token=1), budget=100)
