"""Speed of data loading: decoding, ingest and the loaders against the steps they feed, and the loader's memory.

Two things that are compared run alternately, A B B A …, and the better time of each counts.
"""

import contextlib
import functools
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import av

from benchmarks.settings import Setting, make_examples, make_latents
from benchmarks.steps import TrainingSetup, count_compilations, get_peak_memory
from dit_video.core.shared_array import SharedStrings
from dit_video.data.captions import TokenizedCaptions
from dit_video.data.clips import ClipSource
from dit_video.data.examples import ExampleTable
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.data.ingest.formats import list_clips
from dit_video.data.latents.cache import LatentExample, LatentSource
from dit_video.data.latents.writer import write_latents
from dit_video.data.prefetch import DECODE_THREADS
from dit_video.data.rows import RowSpec, RowStream, load_rows
from dit_video.data.sizes import SizeLimits, count_sampled_frames, fit_size
from dit_video.data.sources import LatentExamples, compute_latent_grids
from dit_video.data.windows import CACHE_BYTES, ClipCrops, WindowBatches
from dit_video.scenes import shapes
from dit_video.tokens import Grid
from dit_video.training import loop
from dit_video.training.hooks.hook import StepCall
from dit_video.training.hooks.logging import MetricsLog, read_metrics
from dit_video.video import decode

_RENDERED_SIZES = (Grid(33, 240, 320), Grid(33, 320, 240), Grid(17, 360, 640))
"""Sizes of the rendered clips, if no folder of clips is set."""


@contextlib.contextmanager
def provide_clips(folder: Path | None, count: int) -> Iterator[Path]:
    """Yield `folder`, or a temporary folder of `count` rendered clips if it is None."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as temporary:
        yield shapes.write_folder(Path(temporary) / "clips", count=count, seed=0, sizes=_RENDERED_SIZES)


def measure_latents(setting: Setting, setup: TrainingSetup, num_examples: int) -> tuple[dict[str, Any], TrainingSetup]:
    """Measure an epoch of cached latents through the real loader and loop, with a denoiser's compiled step."""
    config, examples = setting.denoiser, enumerate(make_examples(setting, num_examples))
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder, count_compilations() as compiled:
        encoded = (
            LatentExample(str(index), example.caption, make_latents(setting, index, example))
            for index, example in examples
        )
        write_latents(Path(folder) / "latents", encoded, identity="benchmark")
        source = LatentSource(Path(folder) / "latents")
        rows = load_latent_rows(setting, source)
        epoch = -(-rows.summarize(devices=1)["rows_per_epoch"] // config.batch)
        last = int(setup.state.step) + epoch
        log = MetricsLog(Path(folder) / "metrics.jsonl")
        compile_counts: list[int] = []
        with contextlib.closing(rows):
            state = loop.run(
                setup.step,
                setup.state,
                lambda _: map(setup.place_batch, rows),
                config=loop.LoopConfig(steps=last, log_every=last, save_every=last),
                hooks=[log, StepCall(lambda _done, _state: compile_counts.append(compiled()))],
                title="an epoch",
            )
        entry = read_metrics(log.path)[-1]
    figures = {
        "examples": num_examples,
        "steps": epoch,
        "step_ms": round(1000 * entry["step_seconds"], 3),
        "waiting_share": round(entry["data_wait"], 4),
        "padding_share": round(rows.summarize(devices=1)["padding"], 4),
        "compilations": compile_counts[-1],
        "peak_memory": get_peak_memory(),
    }
    return figures, setup._replace(state=state)


def load_latent_rows(setting: Setting, latents: LatentSource) -> RowStream:
    """Return the rows of a setting from cached latents."""
    model = setting.model
    captions = TokenizedCaptions(latents.all_captions, model.text_encoder.make_tokenizer())
    grids = compute_latent_grids(latents, model.backbone.patch)
    table = ExampleTable(names=SharedStrings(latents.names), grids=grids, captions=captions)
    spec = RowSpec(layout=model.layout, batch=setting.denoiser.batch)
    return load_rows(LatentExamples(latents, table, patch=model.backbone.patch), spec, seed=0)


def measure_videos(setting: Setting, setup: TrainingSetup, clips: Path, steps: int) -> dict[str, Any]:
    """Measure the autoencoder's training from video files, with decoded frames cached in memory or not."""
    window = setting.autoencoder.windows[0]
    limits = SizeLimits(
        max_pixels=max(setting.data.max_pixels, window.size.h * window.size.w),
        max_frames=max(setting.data.max_frames, window.size.t),
        multiple=setting.model.autoencoder.stride,
    )
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder:
        ingest(clips, Path(folder) / "data")
        source = ClipSource(Path(folder) / "data")
        state = setup.state
        for name, cache_bytes in (("kept", CACHE_BYTES), ("decoded at every use", 0)):
            clip_crops = ClipCrops(source, limits, cache_bytes=cache_bytes)
            first = int(state.step)
            log = MetricsLog(Path(folder) / f"{name}.jsonl")
            with contextlib.closing(WindowBatches(clip_crops, [window], seed=0)) as batches:
                state = loop.run(
                    setup.step,
                    state,
                    functools.partial(_place_batches, setup, batches),
                    config=loop.LoopConfig(steps=first + 2 * steps, log_every=steps, save_every=1 << 30),
                    hooks=[log],
                    title=f"training from videos, {name}",
                )
            entry = read_metrics(log.path)[-1]  # the second half, as the first one fills the cache
            figures[name] = {
                "step_ms": round(1000 * entry["step_seconds"], 3),
                "waiting_share": round(entry["data_wait"], 4),
            }
    return {"clips": len(source), "steps": steps, "threads": DECODE_THREADS, **figures}


def _place_batches(setup: TrainingSetup, batches: Iterator[Any], _start: int) -> Iterator[Any]:
    return map(setup.place_batch, batches)


def measure_decoding(setting: Setting, clips: Path, rounds: int) -> dict[str, Any]:
    """Measure decoding to the training size on one core, against a bare PyAV loop over the same files.

    All frames in the files count, so that the rate shows the savings of sampling at a lower frame rate.
    """
    names = [clip.path for clip in list_clips(clips).clips if clip.offset is None]
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder:
        ingest(clips, Path(folder) / "data")
        infos = {info.name: info for info in ClipSource(Path(folder) / "data").infos}
    stride, patch = setting.model.autoencoder.stride, setting.model.backbone.patch
    multiple = Grid(1, stride.h * patch.h, stride.w * patch.w)
    limits = SizeLimits(max_pixels=max(setting.data.max_pixels, 96 * 128), max_frames=1 << 30, multiple=multiple)
    files = [(Path(path), infos[name]) for path in names if (name := os.path.relpath(path, clips)) in infos]
    sizes = {info.name: fit_size(info, limits) for _, info in files}

    def bare() -> None:
        for path, info in files:
            with av.open(str(path)) as container:
                container.streams.video[0].codec_context.thread_count = 1
                for frame in container.decode(video=0):
                    frame.reformat(sizes[info.name].w, sizes[info.name].h, "rgb24").to_ndarray()

    def ours(fps: float | None) -> None:
        for path, info in files:
            height, width = sizes[info.name][1:]
            frames = info.frames if fps is None else count_sampled_frames(info, replace(limits, fps=fps))
            decode(path, size=Grid(frames, height, width), fps=None if fps is None else min(fps, info.fps))

    with pin_to_one_core():
        best = time_best({"bare": bare, "ours": lambda: ours(None), "ours at 8 fps": lambda: ours(8.0)}, rounds)
    frames = sum(info.frames for _, info in files)
    return {
        "files": len(files),
        "frames": frames,
        **{f"frames_per_second {name}": round(frames / seconds) for name, seconds in best.items()},
        "ratio": round(best["bare"] / best["ours"], 3),
    }


def measure_ingest(clips: Path, rounds: int, *, min_clips: int = 200) -> dict[str, Any]:
    """Measure ingested clips per second with one and with two decoding processes; few clips are repeated."""
    listed = [clip for clip in list_clips(clips).clips if clip.offset is None]
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder:
        source, numbers = Path(folder) / "source", itertools.count()
        source.mkdir()
        for number, clip in zip(range(max(min_clips, len(listed))), itertools.cycle(listed), strict=False):
            (source / f"{number:06d}{Path(clip.name).suffix}").symlink_to(Path(clip.path).resolve())

        def run(workers: int) -> None:
            ingest(source, Path(folder) / str(next(numbers)), config=IngestConfig(follow_links=True), workers=workers)

        best = time_best({"one": lambda: run(1), "two": lambda: run(2)}, rounds, clock=time.perf_counter)
        count = sum(1 for _ in source.iterdir())
    return {
        "clips": count,
        "clips_per_second": {name: round(count / seconds, 1) for name, seconds in best.items()},
        "ratio": round(best["one"] / best["two"], 2),
    }


def measure_memory(setting: Setting, num_examples: int, batches: int) -> dict[str, Any]:
    """Measure the resident memory after a tenth of the batches and at the end."""
    examples = enumerate(make_examples(setting, num_examples))
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder:
        encoded = (
            LatentExample(str(index), example.caption, make_latents(setting, index, example))
            for index, example in examples
        )
        write_latents(Path(folder) / "latents", encoded, identity="benchmark")
        source = LatentSource(Path(folder) / "latents")
        memory = {}
        with contextlib.closing(load_latent_rows(setting, source)) as rows:
            for done in range(1, batches + 1):
                next(rows)
                if done in (max(1, batches // 10), batches):
                    memory[done] = get_resident_memory()
    return {"batches": batches, "bytes": {str(done): size for done, size in memory.items()}}


def get_resident_memory() -> int:
    """Return the resident memory of this process in bytes, or 0 if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def pin_to_one_core() -> Iterator[None]:
    """Pin this thread, and those that it starts, to one core if the system supports it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def time_best(
    runs: Mapping[str, Callable[[], None]], rounds: int, *, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Return the minimum seconds of each, by default of CPU time, which other programs on the core do not affect."""
    best: dict[str, float] = {}
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            start_time = clock()
            runs[name]()
            best[name] = min(best.get(name, float("inf")), clock() - start_time)
    return best
