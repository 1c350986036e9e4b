"""Batches of rows: the same on any number of hosts and workers, from any step."""

import threading
import time

import numpy as np
import pytest

from dit_video.data.latents import LatentExample, LatentSource, write_latents
from dit_video.data.loader import packed_batches, prefetch
from dit_video.errors import UserError
from dit_video.tokens import Grid, RowShape, coordinates, patchify, unpack

PATCH = Grid(1, 2, 2)
SHAPE = RowShape(tokens=64, text=256, segments=16)


def tokenize(caption: str) -> np.ndarray:
    return np.frombuffer(caption.encode(), np.uint8).astype(np.int32) + 3


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


def take(source, count, **options):
    options = {"patch": PATCH, "shape": SHAPE, "batch": 4, "seed": 0, **options}
    batches = packed_batches(source, options.pop("tokenize", tokenize), **options)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def joined(shares):
    """One global batch of the hosts' shares."""
    return type(shares[0])(*(np.concatenate(parts) for parts in zip(*shares, strict=True)))


def assert_equal(one, two):
    for name, a, b in zip(one._fields, one, two, strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_batches_hold_the_examples(source):
    batches = packed_batches(source, tokenize, patch=PATCH, shape=SHAPE, batch=4, seed=0)
    seen = {}
    for _ in range(2 * batches.rows_per_epoch // 4 + 1):
        rows = next(batches)
        assert rows.tokens.shape == (4, 64, 16)
        assert rows.text.shape == (4, 256)
        assert rows.examples.dtype == np.uint32
        for row in zip(*rows, strict=True):
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
        found = [patches[seen[epoch * 50 + rank][0].tobytes()] for rank in range(50)]
        assert sorted(found) == list(range(50))
        for rank, example in enumerate(found):
            _, place, caption = seen[epoch * 50 + rank]
            t, h, w = source.sizes[example]
            np.testing.assert_array_equal(place, coordinates(Grid(t, h // 2, w // 2)))
            np.testing.assert_array_equal(caption, tokenize(source.captions[example]))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_one_batch(source, hosts):
    expected = take(source, 5)
    shares = [take(source, 5, host=host, hosts=hosts) for host in range(hosts)]
    for step in range(5):
        assert shares[0][step].tokens.shape[0] == 4 // hosts
        assert_equal(joined([share[step] for share in shares]), expected[step])


def test_workers_give_the_same_batches(source):
    expected = take(source, 8)
    counted = []
    closure = lambda caption: counted.append(caption) or tokenize(caption)  # noqa: E731 (it can't be pickled)
    for batch, same in zip(take(source, 4, workers=2, tokenize=closure), expected, strict=False):
        assert_equal(batch, same)
    assert sorted(counted) == sorted(set(source.captions))
    shares = [take(source, 3, workers=workers, host=host, hosts=2, start_step=5) for host, workers in ((0, 0), (1, 2))]
    for step in range(3):
        assert_equal(joined([share[step] for share in shares]), expected[5 + step])


def test_resumes_at_any_step(source):
    expected = take(source, 30)
    for start in (1, 7, 29):
        assert_equal(take(source, 1, start_step=start)[0], expected[start])
    assert_equal(take(source, 1, cache_bytes=0, start_step=7)[0], expected[7])


def test_seed_and_plan_hash(source):
    options = {"patch": PATCH, "shape": SHAPE, "batch": 4}
    first, again, other = (packed_batches(source, tokenize, seed=seed, **options) for seed in (0, 0, 1))
    assert first.hash == again.hash != other.hash
    assert 0 <= first.padding < 0.2
    assert not np.array_equal(next(first).tokens, next(other).tokens)


def test_a_data_set_smaller_than_a_batch(source, tmp_path):
    latents = np.ones((1, 4, 4, 4), np.float32)
    write_latents(tmp_path / "one", [LatentExample("a", "", latents)], identity="x")
    rows = take(LatentSource(tmp_path / "one"), 2)
    assert rows[0].valid[:, 0].all()
    assert np.concatenate([batch.examples[:, 0] for batch in rows]).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 3, "hosts": 2}, "multiple of hosts=2"),
        ({"host": 2, "hosts": 2}, "host=2"),
        ({"start_step": -1}, "start_step=-1"),
        ({"patch": Grid(2, 2, 2)}, "0.mp4: latents of 1x4x4 are not divisible by the patch 2x2x2"),
        ({"shape": RowShape(tokens=8, text=256, segments=4)}, "20 video tokens"),
        ({"shape": RowShape(tokens=64, text=5, segments=4)}, "shorten its caption"),
    ],
)
def test_refusals(source, options, message):
    with pytest.raises(UserError, match=message):
        take(source, 1, **options)


def test_prefetch_keeps_order_errors_and_ends():
    def values():
        yield from range(5)
        raise UserError("broken")

    ahead = prefetch(values(), transfer=lambda value: value * 10)
    assert [next(ahead) for _ in range(5)] == [0, 10, 20, 30, 40]
    with pytest.raises(UserError, match="broken"):
        next(ahead)
    assert list(prefetch(iter(range(3)))) == [0, 1, 2]
    endless = prefetch(iter(lambda: 1, 2), depth=1)
    next(endless)
    endless.close()
    deadline = time.monotonic() + 5
    while any(thread.name == "prefetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the thread goes on"
        time.sleep(0.01)
