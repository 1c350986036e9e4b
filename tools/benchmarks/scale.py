"""Seconds and memory of everything between a large table of clips and its batches, on synthetic rows."""

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dit_video.core.grid import map_grids
from dit_video.core.shared_array import SharedStrings
from dit_video.data import tables
from dit_video.data.captions import TokenizedCaptions
from dit_video.data.clips import ClipSource
from dit_video.data.examples import ExampleTable
from dit_video.data.packing.balance import Cost
from dit_video.data.packing.plan import RowPlanner
from dit_video.data.rows import RowSpec, make_planner
from dit_video.data.sizes import SizeLimits, fit_sizes
from dit_video.tokens import Grid, PackedShape

_PART_ROWS = 1 << 18
_BATCH = 64
"""Rows of a step."""
_SIDES = (240, 270, 360, 405, 480, 540, 576, 640, 720, 854, 960, 1080, 1280, 1920)
_LIMITS = SizeLimits(max_pixels=480 * 832, max_frames=81, multiple=Grid(4, 16, 16))
_SHAPE = PackedShape(tokens=65_536, text=16_384, segments=64)


class TableClips(ClipSource):
    """The metadata of clips in a table, without their bytes."""

    def __init__(self, table: tables.Table):
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def column(self, name: str) -> Any:
        values = self._table[name]
        if isinstance(values, np.ndarray):
            return values
        return list(map(tuple, values.to_pylist())) if name == "captions" else values.to_pylist()


def write_rows(folder: Path, count: int) -> None:
    """Write a table of clips of 50 sizes of frames and of any lengths, each with a caption of its own."""
    generator = np.random.default_rng(0)
    sizes = generator.choice(_SIDES, (50, 2))
    parts = [f"train-{number:05}" for number in range(-(-count // _PART_ROWS))]
    for number, part in enumerate(parts):
        ids = np.arange(number * _PART_ROWS, min(count, (number + 1) * _PART_ROWS))
        height, width = sizes[generator.integers(len(sizes), size=len(ids))].T.astype(np.int32)
        frames = generator.integers(1, 300, len(ids), dtype=np.int32)
        columns = {
            "id": ids.astype(np.uint64),
            "name": [f"folder {number % 1000:03}/clip {number:08}.mp4" for number in ids.tolist()],
            "height": height,
            "width": width,
            "frames": frames,
            "fps": np.full(len(ids), 24.0),
            "seconds": (frames - 1) / 24,
            "captions": [[f"a red ball rolls over table number {number}, and falls"] for number in ids.tolist()],
        }
        tables.write_part(folder, part, pa.table(columns))
    tables.write_manifest(folder, "clips", {}, parts)


def measure(count: int, *, is_read: bool = True) -> dict[str, Any]:
    """Return the seconds and the memory of each stage of a training's start on `count` clips.

    Args:
      count: Number of clips.
      is_read: True to also plan the next epoch, and to read steps until the one after it begins.
    """
    stages: dict[str, dict[str, float]] = {"imports": {"seconds": 0.0, "rss_mb": _read_rss()}}

    def run(name: str, function: Callable[[], Any]) -> Any:
        start, cpu_start = time.perf_counter(), time.process_time()
        result = function()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        gc.collect()
        stages[name] = {"seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3), "rss_mb": _read_rss()}
        print(f"{name:14} {seconds:8.2f} s {stages[name]['rss_mb']:8.0f} MB", file=sys.stderr)
        return result

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder, count)
        clips = run("open", lambda: TableClips(tables.Table(folder, cache=folder / "cache")))
        sizes = run("sizes", lambda: fit_sizes(clips, _LIMITS))
        grids = map_grids(lambda size: Grid(1 + size.t // 4, size.h // 16, size.w // 16), sizes)
        names = run("names", lambda: SharedStrings(clips.column("name")))
        captions = run("captions", lambda: TokenizedCaptions(clips.column("captions"), _tokenize))
        table = ExampleTable(names=names, grids=grids, captions=captions)
        spec = RowSpec(layout=_SHAPE, batch=_BATCH, cost=Cost.from_width(1536))
        planner = run("plan of epoch 0", lambda: make_planner(table, spec, seed=0))
        if is_read:
            run("plan of epoch 1", lambda: planner.get_epoch(1))
        content = run("pickle", lambda: ForkingPickler.dumps(planner))
        worker = run("worker opens", lambda: ForkingPickler.loads(content))
        run("first batch", lambda: [worker.get_entries(number) for number in range(_BATCH)])
        document = {"examples": count, "pickle_bytes": len(content), "stages": stages}
        if is_read:
            document["steps_ms"] = _measure_steps(planner, 2 * stages["plan of epoch 1"]["seconds"])
    return document


def _measure_steps(planner: RowPlanner, seconds: float) -> dict[str, float]:
    """Return milliseconds of a step that reads its rows, while a thread plans the next epoch and as that begins."""
    edge = 2 * planner.rows_per_epoch
    starts = range(edge - planner.rows_per_epoch // 2, edge + 10 * _BATCH, _BATCH)
    durations = []
    for start in starts:
        time.sleep(seconds / len(starts))
        begin = time.perf_counter()
        for number in range(start, start + _BATCH):
            planner.get_entries(number)
        durations.append(1000 * (time.perf_counter() - begin))
    figures = {"median": statistics.median(durations), "max": max(durations), "max_at_edge": max(durations[-12:])}
    print("milliseconds of a step's rows:", figures, file=sys.stderr)
    return {name: round(value, 2) for name, value in figures.items()}


def _tokenize(caption: str) -> np.ndarray:
    return np.frombuffer(caption.encode(), np.uint8).astype(np.int32)


def _read_rss() -> float:
    """Return the memory of this process that is not a map of a file, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    anonymous = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return round(anonymous * 1024 / 1e6)
