"""Latents in a bucket are read in place: about as many bytes as their records have, by several threads at once."""

import threading
import time

import numpy as np
import pytest
from fsspec.registry import _registry

from dit_video.core.storage import to_storage_path
from dit_video.data.latents.cache import CachedCaptions, LatentExample, LatentSource
from dit_video.data.latents.writer import LatentWriter
from dit_video.tokens import Field, PackedShape
from support.example_tables import open_latents
from support.fake_bucket import CountingBucket

FILES, EXAMPLES = 8, 8
FIELD = Field(name="control", alignment="grid", shape=(2,))
SHAPE = PackedShape(tokens=64, text=64, segments=4)


class SlowBucket(CountingBucket):
    """A bucket whose answers take some time; it counts how many requests wait at once."""

    lock, waiting, most = threading.Lock(), 0, 0

    def cat_file(self, path, start=None, end=None, **options):
        kind = type(self)
        with self.lock:
            kind.waiting += 1
            kind.most = max(kind.most, kind.waiting)
        time.sleep(0.02)
        with self.lock:
            kind.waiting -= 1
        return super().cat_file(path, start, end, **options)


@pytest.fixture
def latents(monkeypatch, tmp_path):
    """Return the address of latents in a bucket: each file holds several examples, and texts of their captions."""
    monkeypatch.setitem(_registry, "s3", SlowBucket)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    SlowBucket.store.clear()
    SlowBucket.pseudo_dirs[:] = [""]
    folder = to_storage_path("s3://bucket/latents")
    draw = np.random.default_rng(0)

    def write(writer, number):
        examples, texts = [], []
        for index in range(number * EXAMPLES, (number + 1) * EXAMPLES):
            values = draw.standard_normal((2, 8, 8, 16)).astype(np.float32)
            field = {"control": draw.standard_normal((2, 8, 8, 2)).astype(np.float32)}
            examples.append(LatentExample(f"{index}.mp4", (f"caption {index}",), values, fields=field))
            texts.append((f"caption {index}", draw.standard_normal((8, 256)).astype(np.float32)))
        writer.write(number, examples, [*texts, ("", np.ones((1, 256), np.float32))] if number == 0 else texts)

    writer = LatentWriter(folder=folder, identity="x", num_files=FILES, fields=(FIELD,))
    for number in range(FILES):
        write(writer, number)
    assert writer.finish()
    return folder


def count_read(function):
    """Return the bytes that a function reads from the bucket."""
    SlowBucket.calls.clear()
    function()
    return SlowBucket.calls["bytes"]


def test_an_example_of_each_file_costs_little_more_than_its_bytes(latents, tmp_path):
    source = LatentSource(latents)
    indices = range(3, FILES * EXAMPLES, EXAMPLES)
    read = count_read(lambda: [(source.read_example(index), source.read_text(index)) for index in indices])
    needed = len(indices) * (2 * (2 * 8 * 8 * (16 + 2)) + 2 * 8 * 256)
    whole = sum(len(file.getvalue()) for name, file in SlowBucket.store.items() if name.endswith(".array_record"))
    assert needed < read <= 1.2 * needed
    assert read < whole / 4
    # Nothing but tables is copied to this machine.
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {".parquet"}


def test_opening_reads_tables_alone(latents):
    assert count_read(lambda: LatentSource(latents)) < 40_000


def test_batches_read_every_record_once_and_several_at_once(latents, monkeypatch):
    real, examples = LatentSource.read_example, []

    def read_example(self, index):
        examples.append(index)
        return real(self, index)

    monkeypatch.setattr(LatentSource, "read_example", read_example)
    source = LatentSource(latents)
    SlowBucket.most = 0
    batches = open_latents(source, CachedCaptions(source), shape=SHAPE, batch=2)
    read = count_read(lambda: [next(batches) for _ in range(4)])
    batches.close()
    assert SlowBucket.most >= 4
    assert len(examples) >= 4 * 2  # and those of batches that are read ahead
    assert read <= 1.2 * len(examples) * (2 * (2 * 8 * 8 * (16 + 2)) + 2 * 8 * 256)
