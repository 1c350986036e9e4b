"""Batches of rows: the same for any number of hosts and workers, and from any step."""

import contextlib
import itertools
import json

import jax
import numpy as np
import pytest

from dit_video.core.errors import DecodeError, UserError
from dit_video.core.shared_array import SharedStrings
from dit_video.data.captions import TokenizedCaptions
from dit_video.data.clips import ClipSource
from dit_video.data.examples import ExampleTable, compute_attention_pairs
from dit_video.data.ingest.engine import ingest
from dit_video.data.latents.cache import LatentExample, LatentSource
from dit_video.data.latents.writer import write_latents
from dit_video.data.packing.balance import Cost
from dit_video.data.packing.mixture import Mixture
from dit_video.data.packing.plan import RowPlanner
from dit_video.data.rows import RowSpec, load_rows
from dit_video.data.sizes import SizeLimits
from dit_video.data.sources import ClipExamples, OnlineEncoding, compute_clip_grids, compute_latent_grids
from dit_video.scenes import shapes
from dit_video.tokens import Grid, PackedShape, compute_positions, patchify, unpack
from support.example_tables import open_latents
from support.fakes import average_patches, tokenize

PATCH = Grid(1, 2, 2)
SHAPE = PackedShape(tokens=64, text=256, segments=16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    generator = np.random.default_rng(0)
    sizes = [(1, 4, 4), (1, 4, 6), (3, 4, 4), (3, 6, 4), (5, 4, 4)]

    def examples():
        for index in range(50):
            latents = generator.standard_normal((*sizes[index % 5], 4)).astype(np.float32)
            yield LatentExample(f"{index}.mp4", f"clip number {index % 7}", latents)

    folder = tmp_path_factory.mktemp("loader") / "latents"
    write_latents(folder, examples(), identity="x", dtype="float32")
    return LatentSource(folder)


def open_rows(source, *, shape=SHAPE, batch=4, tokenize=tokenize, **options):
    captions = TokenizedCaptions(source.all_captions, tokenize)
    return open_latents(source, captions, shape=shape, batch=batch, **options)


def take(source, count, **options):
    with contextlib.closing(open_rows(source, **options)) as rows:
        return [next(rows) for _ in range(count)]


def join_shares(shares):
    """Join the hosts' parts into one global batch."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *shares)


def assert_equal(one, two):
    for name, a, b in zip(one._fields, one, two, strict=True):
        for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert left.dtype == right.dtype, name
            np.testing.assert_array_equal(left, right, err_msg=name)


def test_batches_hold_the_examples_of_the_plan(source):
    batches = open_rows(source)
    seen = {}
    for _ in range(2 * batches.planner.rows_per_epoch // 4 + 1):
        rows = next(batches)
        assert rows.tokens.shape == (4, 64, 16)
        assert rows.text.shape == (4, 256)
        assert rows.examples.dtype == np.uint32
        rest = (rows.text, rows.text_segments, rows.examples, rows.valid)
        for row in zip(rows.tokens, rows.segments, rows.positions, *rest, strict=True):
            tokens, segments, where, text, text_segments, ranks, valid = row
            parts = unpack(tokens, segments)
            assert len(parts) == valid.sum()
            for index, (part, place) in enumerate(zip(parts, unpack(where, segments), strict=True)):
                caption = text[text_segments == index + 1]
                seen[int(ranks[index])] = (part, place, caption)
    batches.close()
    assert set(range(100)) <= set(seen)  # two epochs, each rank once
    patches = {patchify(source[i], PATCH).tobytes(): i for i in range(50)}
    for epoch in range(2):
        result = [patches[seen[epoch * 50 + rank][0].tobytes()] for rank in range(50)]
        assert sorted(result) == list(range(50))
        for rank, example in enumerate(result):
            _, place, caption = seen[epoch * 50 + rank]
            t, h, w = source.sizes[example]
            np.testing.assert_array_equal(place, compute_positions(Grid(t, h // 2, w // 2)))
            np.testing.assert_array_equal(caption, tokenize(source.all_captions[example][0]))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_one_batch(source, hosts):
    expected = take(source, 5)
    shares = [take(source, 5, host=host, hosts=hosts) for host in range(hosts)]
    for step in range(5):
        assert shares[0][step].tokens.shape[0] == 4 // hosts
        assert_equal(join_shares([share[step] for share in shares]), expected[step])


@pytest.mark.slow
def test_workers_give_the_same_batches(source):
    expected = take(source, 8)
    counted = []
    closure = lambda caption: counted.append(caption) or tokenize(caption)  # noqa: E731 (it can't be pickled)
    for batch, same in zip(take(source, 4, workers=2, tokenize=closure), expected, strict=False):
        assert_equal(batch, same)
    assert sorted(counted) == sorted({"", *itertools.chain(*source.all_captions)})


@pytest.mark.slow
def test_workers_of_several_hosts_give_the_same_batches(source):
    expected = take(source, 8)
    shares = [take(source, 3, workers=workers, host=host, hosts=2, start=5) for host, workers in ((0, 0), (1, 2))]
    for step in range(3):
        assert_equal(join_shares([share[step] for share in shares]), expected[5 + step])


def test_batches_resume_at_any_step(source):
    expected = take(source, 30)
    for start in (1, 7, 29):
        assert_equal(take(source, 1, start=start)[0], expected[start])


def test_the_hash_and_the_batches_depend_on_the_seed(source):
    first, again, other = (open_rows(source, seed=seed) for seed in (0, 0, 1))
    assert first.hash == again.hash != other.hash
    assert 0 <= first.summarize(devices=1)["padding"] < 0.2
    assert not np.array_equal(next(first).tokens, next(other).tokens)


def test_the_summary_counts_sizes_and_costs(source):
    cost = Cost.from_width(32)
    batches = open_rows(source, cost=cost)
    summary = json.loads(json.dumps(batches.summarize(devices=2)))
    batches.close()
    assert summary["sizes"] == {"1x2x2": 10, "1x2x3": 10, "3x2x2": 10, "3x3x2": 10, "5x2x2": 10}
    assert summary["examples"] == 50
    assert summary["plan"] == batches.hash
    assert summary["padding"] == pytest.approx(batches.planner.get_epoch(0).padding, abs=1e-5)
    assert 0 <= summary["imbalance"]["mean"] <= summary["imbalance"]["worst"]
    assert summary["cost"] == "28672 * tokens of the row + 128 * pairs in attention"
    assert batches.summarize(devices=3)["imbalance"] is None
    assert summary["left_out"] == 0
    assert "0 examples dropped" in str(batches)
    assert summary["sources"] is None
    pairs = compute_attention_pairs(compute_latent_grids(source, PATCH), lambda grid: grid.t * (grid.h * grid.w) ** 2)
    frames = open_rows(source, cost=cost, columns={"attention_pairs": pairs})
    assert frames.summarize(devices=2)["imbalance"]["mean"] < summary["imbalance"]["mean"]
    assert frames.hash != batches.hash
    frames.close()


def test_a_mixture_is_drawn_by_weight(source):
    mixture = Mixture(sizes=(25, 25), weights=(4, 1), length=50)
    batches = open_rows(source, batch=1, columns={"mixture": mixture})
    patches = {patchify(source[i], PATCH).tobytes(): i for i in range(50)}
    drawn = []
    for _ in range(4 * batches.planner.rows_per_epoch):
        rows = next(batches)
        drawn += [patches[part.tobytes()] for part in unpack(rows.tokens[0], rows.segments[0])]
    batches.close()
    assert np.mean(np.asarray(drawn) < 25) == pytest.approx(0.8, abs=0.02)
    sources = batches.summarize(devices=1)["sources"]
    assert sources["examples"] == pytest.approx([0.8, 0.2], abs=0.001)
    assert sum(sources["tokens"]) == pytest.approx(1, abs=1e-4)


def test_a_data_set_smaller_than_a_batch_is_repeated(source, tmp_path):
    latents = np.ones((1, 4, 4, 4), np.float32)
    write_latents(tmp_path / "one", [LatentExample("a", "", latents)], identity="x")
    rows = take(LatentSource(tmp_path / "one"), 2)
    assert rows[0].valid[:, 0].all()
    assert np.concatenate([batch.examples[:, 0] for batch in rows]).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"batch": 3, "hosts": 2}, "multiple of hosts=2"),
        ({"host": 2, "hosts": 2}, "host=2"),
        ({"start": -1}, "start=-1"),
        ({"ahead_bytes": 0}, "ahead_bytes=0"),
        ({"patch": Grid(2, 2, 2)}, "0.mp4: latents of 1x4x4 are not divisible by the patch 2x2x2"),
        ({"shape": PackedShape(tokens=8, text=256, segments=4)}, "20 video tokens"),
        ({"shape": PackedShape(tokens=64, text=5, segments=4)}, "shorten its caption"),
    ],
)
def test_invalid_arguments_are_refused(source, options, message):
    with pytest.raises(UserError, match=message):
        take(source, 1, **options)


def test_captions_are_drawn_anew_every_epoch():
    captions = [("a", "bb", "ccc"), ("d",), ()] * 4
    tokens = TokenizedCaptions(captions, tokenize)
    names = SharedStrings(str(index) for index in range(12))
    planner = RowPlanner(
        ExampleTable(names=names, grids=np.asarray([Grid(1, 2, 2)] * 12), captions=tokens), SHAPE, seed=0
    )
    drawn = {example: [] for example in range(12)}
    for number in range(40 * planner.rows_per_epoch):
        for entry in planner.get_entries(number):
            text = tokens.read(entry.example, entry.caption_index)
            drawn[entry.example].append(bytes(text.astype(np.uint8) - 3).decode())
    for example, texts in drawn.items():
        assert len(texts) == 40
        assert set(texts) == set(captions[example] or ("",))
    assert drawn[0] != drawn[3]
    assert planner.get_entries(7) == planner.get_entries(7)


def test_a_damaged_example_keeps_its_place_and_does_not_count(source, monkeypatch, caplog):
    expected = take(source, 4)
    damaged, read = source.names[12], LatentSource.read_example

    def reading(self, index):
        if self.names[index] == damaged:
            raise DecodeError("record 12 is damaged")
        return read(self, index)

    monkeypatch.setattr(LatentSource, "read_example", reading)
    batches = take(source, 4)
    missing = 0
    for batch, whole in zip(batches, expected, strict=True):
        for name in ("segments", "positions", "text", "text_segments", "examples"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(whole, name))
        lost = whole.valid & ~batch.valid
        missing += lost.sum()
        for row, segment in zip(*np.nonzero(lost), strict=True):
            assert not batch.tokens[row][batch.segments[row] == segment + 1].any()
        kept = np.take_along_axis(batch.valid, np.maximum(batch.segments - 1, 0), axis=1)
        np.testing.assert_array_equal(batch.tokens[kept], whole.tokens[kept])
    assert missing >= 1
    assert f"{damaged} is damaged" in caplog.text


# --- from video files -----------------------------------------------------------------------------------------------

LIMITS = SizeLimits(max_pixels=32 * 32, max_frames=5, multiple=Grid(4, 16, 16))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    sizes = (Grid(17, 32, 32), Grid(9, 16, 32), Grid(1, 32, 16))
    shapes.write_folder(folder / "clips", count=20, seed=0, sizes=sizes)
    ingest(folder / "clips", folder / "data")
    return ClipSource(folder / "data")


STRIDE = Grid(4, 8, 8)


def encoded(clips, count, encode=average_patches, columns=None, **options):
    table = ExampleTable(
        names=SharedStrings(clips.column("name")),
        grids=compute_clip_grids(clips, LIMITS, stride=STRIDE, patch=PATCH),
        captions=TokenizedCaptions(clips.column("captions"), tokenize),
        **columns or {},
    )
    encoding = OnlineEncoding(encode=encode, limits=LIMITS, stride=STRIDE, channels=3, patch=PATCH)
    spec = RowSpec(layout=PackedShape(tokens=32, text=256, segments=8), batch=2)
    with contextlib.closing(load_rows(ClipExamples(clips, table, encoding), spec, seed=0, **options)) as rows:
        return [next(rows) for _ in range(count)]


@pytest.mark.slow
def test_rows_can_be_made_from_video_files(clips):
    batches = encoded(clips, 8)
    assert all(batch.valid.sum() and batch.tokens.shape == (2, 32, 12) for batch in batches)
    assert {time for batch in batches for time in batch.positions[..., 0].flat} == {0.0, 1.0}
    for start in (1, 6):
        assert_equal(encoded(clips, 1, start=start)[0], batches[start])
    shares = [encoded(clips, 2, host=host, hosts=2, workers=host) for host in range(2)]
    for step in range(2):
        assert_equal(join_shares([share[step] for share in shares]), batches[step])


def test_coordinates_along_time_are_in_seconds(source, clips):
    """This holds for cached latents and video files; the seconds between two tokens differ between examples.

    With a lead, all tokens but the first begin earlier.
    """
    [cached] = take(source, 1, columns={"token_dt": 0.25 + np.arange(50)})
    patches = {patchify(source[i], PATCH).tobytes(): i for i in range(50)}
    for row in range(4):
        both = [unpack(values[row], cached.segments[row]) for values in (cached.tokens, cached.positions)]
        for tokens, coordinates in zip(*both, strict=True):
            example = patches[tokens.tobytes()]
            t, h, w = source.sizes[example]
            np.testing.assert_array_equal(
                coordinates, compute_positions(Grid(t, h // 2, w // 2), step=(0.25 + example, 1.0, 1.0))
            )
    seconds = np.full(len(clips), 0.5)
    [live] = encoded(clips, 1, columns={"token_dt": seconds})
    assert set(live.positions[..., 0].flat) == {0.0, 0.5}
    [led] = encoded(clips, 1, columns={"token_dt": seconds, "token_lead": 0.75})
    assert set(led.positions[..., 0].flat) == {0.0, 0.125}
    counted, timed = open_rows(source), open_rows(source, columns={"token_dt": np.full(50, 0.5)})
    assert counted.hash != timed.hash
    counted.close()
    timed.close()


def test_an_epoch_draws_another_stretch_of_a_long_clip(clips):
    long = clips.select([info.name for info in clips.infos if info.frames == 17][:1])
    batches = encoded(long, 12)
    assert len({batch.tokens[0].tobytes() for batch in batches}) > 4


def test_a_clip_that_turns_out_damaged_is_masked(clips, monkeypatch):
    whole = encoded(clips, 6)
    damaged, read = clips.infos[3].name, ClipSource.__getitem__
    monkeypatch.setattr(
        ClipSource, "__getitem__", lambda self, index: b"x" if self.infos[index].name == damaged else read(self, index)
    )
    batches = encoded(clips, 6)
    assert sum((one.valid & ~other.valid).sum() for one, other in zip(whole, batches, strict=True)) >= 1
    for one, other in zip(whole, batches, strict=True):
        np.testing.assert_array_equal(one.segments, other.segments)


def test_rows_are_the_same_in_parts(clips):
    for batch, expected in zip(encoded(clips, 3, ahead_bytes=1, start=2), encoded(clips, 5)[2:], strict=True):
        assert_equal(batch, expected)


def test_errors_of_the_encoder_are_raised(clips):
    def broken(_clips):
        raise UserError("out of memory")

    with pytest.raises(UserError, match="out of memory"):
        encoded(clips, 1, encode=broken)
