"""Latents of very many examples are opened in seconds, in little memory, and pickled to workers as paths."""

import gc
import pickle
import time

import numpy as np
import pyarrow as pa
import pytest

from dit_video.core.errors import UserError
from dit_video.core.shared_array import SharedStrings
from dit_video.data.clips import ClipSource
from dit_video.data.examples import ExampleTable
from dit_video.data.latents.cache import CachedCaptions, LatentExample, LatentSource
from dit_video.data.latents.plan import check_clips
from dit_video.data.latents.writer import LatentWriter
from dit_video.data.packing.plan import RowPlanner
from dit_video.data.sources import LatentExamples, compute_latent_grids
from dit_video.data.tables import Table, compute_row_id, read_parquet, write_column, write_manifest, write_part
from dit_video.tokens import Grid, PackedShape
from support.clip_tables import SCHEMA, write_table
from support.process_memory import read_memory, release_memory


def repeat_row(folder, kind, settings, columns):
    """Make a table of one row one of very many, with these columns and the same record for all rows."""
    row = read_parquet(folder / "index" / "train-00000.parquet").slice(0, 1)
    count, arrays = len(columns["id"]), {}
    for field in row.schema:
        values = columns.get(field.name)
        arrays[field.name] = pa.repeat(row[field.name][0], count) if values is None else pa.array(values, field.type)
    write_part(folder, "train-00000", pa.table(arrays, schema=row.schema))
    write_manifest(folder, kind, settings, ["train-00000"])


def write_many(folder, count):
    """Write the table of so many clips, and their latents."""
    ids = np.arange(count, dtype=np.uint64)
    names = [f"folder/{number:07d}.mp4" for number in range(count)]
    captions = [[f"a caption of clip {number} of some sixty characters, and more"] for number in range(count)]
    rows = {"id": ids, "name": names, "payload": names, "captions": captions, "outcome": ["kept"] * count}
    blank = {field.name: pa.nulls(count, field.type) for field in SCHEMA if field.name not in rows}
    write_table(folder / "clips", pa.table(rows | blank).select(SCHEMA.names).cast(SCHEMA))
    writer = LatentWriter(folder=folder / "latents", identity="x", num_files=1)
    writer.write(0, [LatentExample("a", "a", np.ones((1, 4, 4, 2), np.float32))], [("", np.ones((1, 3), np.float32))])
    assert writer.finish()
    settings = Table(folder / "latents", kind="latents").settings
    repeat_row(folder / "latents", "latents", settings, {"id": ids, "name": names, "clip": names, "payload": names})
    keys = [compute_row_id(texts[0]) for texts in captions]
    columns = {"id": ids, "chosen": [True] * count, "captions": captions}
    columns["caption_ids"] = pa.array([[key] for key in keys], pa.list_(pa.uint64()))
    write_column(folder / "latents", "captions", columns)
    text_ids = np.asarray([compute_row_id(""), *keys], np.uint64)
    repeat_row(folder / "latents" / "texts", "texts", {"width": 3}, {"id": text_ids})


@pytest.mark.parametrize(
    "count", [pytest.param(60_000, marks=pytest.mark.slow), pytest.param(1_000_000, marks=pytest.mark.nightly)]
)
def test_latents_of_many_clips_are_opened_in_seconds(tmp_path, monkeypatch, count):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_many(tmp_path, count)
    gc.collect()
    release_memory()
    # CPU time, as other tests run beside this one.
    before, start = read_memory("RssAnon"), time.process_time()
    latents = LatentSource(tmp_path / "latents")
    captions = CachedCaptions(latents)
    assert len(latents) == len(captions.lengths) == count
    assert time.process_time() - start < 5 * max(0.2, count / 1_000_000)
    release_memory()
    assert read_memory("RssAnon") - before < 300 * 2**20
    assert latents.groups[-1] == count - 1
    assert latents.all_captions[count - 1] == (f"a caption of clip {count - 1} of some sixty characters, and more",)
    np.testing.assert_array_equal(captions.read(count - 1, 0), np.ones((1, 3)))
    start = time.process_time()
    clips = ClipSource(tmp_path / "clips")
    check_clips(latents, clips)
    with pytest.raises(UserError, match=r"0 clips are missing, 1 examples have changed, such as folder/0000007\.mp4"):
        check_clips(latents, clips.exclude(["folder/0000007.mp4"]))
    assert time.process_time() - start < 20 * max(0.2, count / 1_000_000)
    # What a worker receives.
    shape, patch = PackedShape(tokens=1024, text=1024, segments=64), Grid(1, 2, 2)
    table = ExampleTable(
        names=SharedStrings(latents.names), grids=compute_latent_grids(latents, patch), captions=captions
    )
    examples, planner = LatentExamples(latents, table, patch=patch), RowPlanner(table, shape, seed=0)
    content = pickle.dumps((examples, planner))
    assert len(content) < 50_000
    examples, planner = pickle.loads(content)
    assert examples.read(planner.get_entries(3)[0]).tokens.any()
