"""Samples in a folder: one file each, made once, and the list of what was asked for."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.distributed.faults.progress import count_progress, declare_phase
from dit_video.distributed.gather import is_first_process
from dit_video.distributed.processes import main_process_first, wait_for_all_processes, wait_for_main_process
from dit_video.evaluation.clip_set import PROMPTS_FILE, ClipSet, make_file_set
from dit_video.sampling import Sampling
from dit_video.sampling.clip_recipe import describe_config, describe_request
from dit_video.sampling.devices import SampledLatents
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Request
from dit_video.sampling.request_file import INPUTS_FOLDER, list_files, write_request
from dit_video.sampling.tasks import get_task_name
from dit_video.sampling.tasks.task import describe_task
from dit_video.sampling.tasks.task_file import TaskEntry, get_entry_prompt, make_request, write_task
from dit_video.video import Clip

SETTINGS_FILE, SHEET_FILE = "settings.json", "contact_sheet.png"
_OWN = re.compile(rf"\d{{3,}}-[a-z0-9-]+\.(png|mp4|webm|apng)|{INPUTS_FOLDER}/[a-z_]+-[0-9a-f]{{16}}\.(png|apng|npy)")
"""Files of samples, and of the pictures and the noise of requests."""
_SHEET_FRAMES, _SHEET_ROWS, _GAP = 6, 50, 2

MakeClips = Callable[[Sequence[int]], Iterable[Clip]]
"""A function from numbers of samples to their clips."""


class SampleFolder:
    """A folder of samples, one file for each request or task.

    Each file is complete or absent, and is not made again: an interrupted sampling goes on. `settings.json` says how
    samples are made. When all of them are there, `prompts.json` lists them, and their pictures and noise are in
    `inputs/`; `read_entries` reads the list.

    Args:
      folder: Folder of the samples.
      pipeline: The model.
      entries: Requests and tasks that are sampled.
      sampling: Steps, solver and guidance; the pipeline's own by default.
      codec: Format of the files: mp4, which is webm for odd sizes, webm or apng. Images are png.
      crf: Quality of mp4 and webm; None for the default of written clips.
      replace_others: Whether samples of other entries, settings or weights are replaced.
      share: Returns a context that the first process, which writes all samples, runs before the others, which then have
        them; None if all processes see the folder, where each of them writes a part.

    Raises:
      UserError: If a request or task does not fit the model, the folder holds files that are not samples, or samples
        that were made otherwise are not to be replaced; the message names the differences.
    """

    def __init__(
        self,
        folder: str | Path,
        pipeline: Pipeline,
        entries: Sequence[Request | TaskEntry],
        *,
        sampling: Sampling | None = None,
        codec: str = "mp4",
        crf: int | None = None,
        replace_others: bool = False,
        share: Callable[[], AbstractContextManager[None]] | None = None,
    ):
        self.folder, self._pipeline = Path(folder).absolute(), pipeline
        self._requests = {number: entry for number, entry in enumerate(entries) if isinstance(entry, Request)}
        self._tasks = {number: entry for number, entry in enumerate(entries) if isinstance(entry, TaskEntry)}
        self._codec, self._crf, self._is_shared = codec, crf, share is None
        self._share = main_process_first if share is None else share
        self._sampling = pipeline.make_sampling(sampling)
        self.weights = pipeline.compute_digest()
        """Hash of the weights that make the samples."""
        requests = [make_request(entry, pipeline.config) for entry in entries]
        pipeline.check_decoding([request for request in requests if request is not None])
        self._prompts = [get_entry_prompt(*each) for each in zip(entries, requests, strict=True)]
        self._stems = [f"{number:03d}-{_make_slug(prompt)}" for number, prompt in enumerate(self._prompts)]
        settings = {
            "sampling": describe_config(self._sampling),
            "weights": self.weights,
            "model": pipeline.describe_models(),
            "codec": [codec, crf],
        }
        described = {
            "settings": settings,
            "requests": [_describe(*each) for each in zip(entries, requests, strict=True)],
        }
        # In the form that is read from the file, where tuples are lists.
        self._open(json.loads(json.dumps(described)), replace_others=replace_others)

    def __len__(self) -> int:
        """Return the number of samples, with those that do not exist yet."""
        return len(self._stems)

    def _open(self, described: dict[str, Any], *, replace_others: bool) -> None:
        path = self.folder / SETTINGS_FILE
        if not is_first_process() and (replace_others or not self._is_shared):
            return  # the first process decides
        check_only_samples(self.folder)
        written = config_json.rewrite(read_json(path)) if path.is_file() else None
        is_new = not self.folder.exists() or not any(self.folder.iterdir())
        difference = "" if is_new else _describe_difference(written, described)
        if difference and not replace_others:
            raise UserError(
                f"{self.folder} holds samples that were made otherwise: {difference}. Use another folder, or remove "
                "this one"
            )
        if self._is_shared and not replace_others:
            wait_for_all_processes()  # until all have looked at the folder
        if is_first_process() and (is_new or difference):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            write_json(path, described)

    def get_path(self, number: int) -> Path | None:
        """Return the file of a sample; None if it does not exist yet."""
        stem = self._stems[number]
        return next(
            (path for suffix in ("png", "mp4", "webm", "apng") if (path := self.folder / f"{stem}.{suffix}").is_file()),
            None,
        )

    def list_missing(self) -> list[int]:
        """Return the numbers of the samples that do not exist yet."""
        return [number for number in range(len(self)) if self.get_path(number) is None]

    def fill(self, progress: Callable[[int], None] | None = None) -> ClipSet:
        """Make the samples that do not exist yet, and return all.

        In a run of several processes all of them call this.

        Args:
          progress: Called with the number of samples that exist.

        Raises:
          UserError: If the disk is full.
        """
        for write in self.start(progress):
            write()
        if self._is_shared:
            wait_for_all_processes()
        with self._share():
            return self.finish() if is_first_process() else self.open()

    def start(self, progress: Callable[[int], None] | None = None) -> Iterator[Callable[[], None]]:
        """Sample part by part, and yield the functions that write this process's clips of each part.

        The functions decode the latents of requests, for which they need the autoencoder alone; the clips of tasks are
        decoded before. In a run of several processes all of them call this.
        """
        wait_for_main_process()
        missing = self.list_missing()
        done = len(self) - len(missing)
        requests, tasks = ([number for number in missing if number in kind] for kind in (self._requests, self._tasks))
        for part, make_clips in chain(self._sample_requests(requests), self._run_tasks(tasks)):
            count_progress()
            yield partial(self._write, self._select_own(part), make_clips, done, progress)
            done += len(part)

    def _split(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """Return parts that are sampled together."""
        size = max(1, 4 * self._pipeline.config.batch)
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def _sample_requests(self, numbers: Sequence[int]) -> Iterator[tuple[Sequence[int], MakeClips]]:
        """Yield parts of the requests, and the functions that decode their clips.

        If a pipeline moves the weights of its stages from host memory to the devices, all latents, which are small, are
        sampled first, so that the weights move once and not for every part.
        """
        if not numbers:
            return
        pipeline, parts = self._pipeline, self._split(numbers)
        requests = [[self._requests[number] for number in part] for part in parts]
        if pipeline.model_parts.offload is None:
            sampled = (pipeline.sample_many(each, sampling=self._sampling) for each in requests)
        else:
            with declare_phase("sample"):
                samples = iter(pipeline.sample_many(list(chain(*requests)), sampling=self._sampling))
            sampled = (list(islice(samples, len(part))) for part in parts)
        for part, samples_of_part in zip(parts, sampled, strict=True):
            by_number = dict(zip(part, samples_of_part, strict=True))

            def decode(numbers: Sequence[int], by_number: Mapping[int, SampledLatents] = by_number) -> list[Clip]:
                return pipeline.decode_many([by_number[number] for number in numbers])

            yield part, decode

    def _run_tasks(self, numbers: Sequence[int]) -> Iterator[tuple[Sequence[int], MakeClips]]:
        """Yield parts of the tasks, and the functions that return their results."""
        for part in self._split(numbers):
            tasks, options = zip(*(self._tasks[number] for number in part), strict=True)
            results = dict(zip(part, self._pipeline.run_many(tasks, options, sampling=self._sampling), strict=True))
            yield part, partial(map, results.__getitem__)

    def _select_own(self, part: Sequence[int]) -> Sequence[int]:
        """Return the numbers of the samples that this process writes."""
        if self._is_shared:
            return part[jax.process_index() :: jax.process_count()]
        return part if is_first_process() else ()

    def _write(
        self, numbers: Sequence[int], make_clips: MakeClips, done: int, progress: Callable[[int], None] | None
    ) -> None:
        shares = jax.process_count() if self._is_shared else 1
        for index, (number, clip) in enumerate(zip(numbers, make_clips(numbers), strict=True), 1):
            has_odd_side = self._codec == "mp4" and (clip.height % 2 or clip.width % 2)
            suffix = "png" if len(clip) == 1 else "webm" if has_odd_side else self._codec
            crf = self._crf if suffix in ("mp4", "webm") else None
            try:
                clip.save(self.folder / f"{self._stems[number]}.{suffix}", crf=crf)
            except OSError as error:
                rule = f"{self.folder} cannot be written after {len(self) - len(self.list_missing())} samples ({error})"
                raise UserError(f"{rule}. Free space on the disk") from error
            count_progress()
            if progress is not None:
                progress(min(done + index * shares, len(self)))

    def finish(self) -> ClipSet:
        """Write `prompts.json`, and return the samples, which all exist."""
        entries = [{"file": self._get_file(number), **self._describe_entry(number)} for number in range(len(self))]
        write_json(self.folder / PROMPTS_FILE, entries)
        return self.open()

    def open(self) -> ClipSet:
        """Return the samples, which all exist."""
        return make_file_set(self.folder, [self._get_file(number) for number in range(len(self))], self._prompts)

    def _get_file(self, number: int) -> str:
        path = self.get_path(number)
        assert path is not None
        return path.name

    def _describe_entry(self, number: int) -> dict[str, Any]:
        if (request := self._requests.get(number)) is not None:
            return write_request(replace(request, size=self._pipeline.config.resolve_size(request)), self.folder)
        return write_task(self._tasks[number], self.folder) | {"prompt": self._prompts[number]}


def _make_slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "unconditional"


def _describe(entry: Request | TaskEntry, request: Request | None) -> dict[str, Any]:
    """Return all that an entry asks for; pictures are given by hashes of their pixels."""
    if isinstance(entry, Request):
        assert request is not None
        return describe_request(request)
    described = {"task": get_task_name(entry.task), **describe_task(entry.task)}
    return {**described, "prompt": get_entry_prompt(entry, request), "options": describe_request(entry.options)}


def _describe_difference(old: Any, new: dict[str, Any]) -> str:
    """Return how samples were made differently; if their numbers differ, only the numbers."""
    if not isinstance(old, dict) or old.keys() != new.keys():
        return f"no {SETTINGS_FILE} says how"
    counts = [len(each["requests"]) for each in (old, new)]
    if counts[0] == counts[1]:
        return config_json.describe_difference(old, new)
    settings = config_json.describe_difference(old["settings"], new["settings"], "settings")
    return ", ".join(filter(None, (f"there are {counts[0]} samples there and {counts[1]} here", settings)))


def check_only_samples(folder: Path) -> None:
    """Check that a folder holds nothing other than samples, or does not exist.

    Raises:
      UserError: If the folder holds other files.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder for the samples")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    present = {name for name in present if not Path(name).name.startswith(".")}
    listed = read_json(folder / PROMPTS_FILE) if PROMPTS_FILE in present else []
    samples = [entry for entry in listed if isinstance(entry, dict) and "file" in entry]
    expected = {PROMPTS_FILE, *(file for entry in samples for file in list_files(entry))} if samples else set[str]()
    if SETTINGS_FILE in present:  # an interrupted sampling has no list yet
        expected |= {SETTINGS_FILE, SHEET_FILE, *filter(_OWN.fullmatch, present)}
    if foreign := sorted(present - expected):
        raise UserError(f"{folder} holds other files than samples, such as {foreign[0]}; use another folder")


def write_contact_sheet(samples: ClipSet) -> Path:
    """Write an image with a row of frames of each sample into their folder, of the first 50, and return its file."""
    path = Path(samples.location) / SHEET_FILE
    make_contact_sheet([samples.read(number, None) for number in range(len(samples.names))[:_SHEET_ROWS]]).save(path)
    return path


def make_contact_sheet(clips: Sequence[Clip]) -> Clip:
    """Return an image with a row of up to six frames of each clip, equally far apart in time."""
    height, width = max(clip.height for clip in clips) + _GAP, max(clip.width for clip in clips) + _GAP
    sheet = np.full((len(clips) * height, _SHEET_FRAMES * width, 3), 255, np.uint8)
    for row, clip in enumerate(clips):
        numbers = np.unique(np.linspace(0, len(clip.frames) - 1, _SHEET_FRAMES).round().astype(int))
        for column, frame in enumerate(clip.frames[numbers]):
            top, left = row * height, column * width
            sheet[top : top + clip.height, left : left + clip.width] = frame
    return Clip(sheet[None], fps=1.0)
