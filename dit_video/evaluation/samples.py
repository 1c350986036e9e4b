"""Samples in a folder: one file each, and a list of their requests."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.core.files import atomic_path, read_json, write_json
from dit_video.distributed.faults.progress import count_progress, declare_phase
from dit_video.distributed.gather import is_first_process
from dit_video.distributed.processes import wait_for_main_process
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Request
from dit_video.sampling.request_file import INPUTS_FOLDER, list_files, write_request
from dit_video.video import Clip, decode

PROMPTS_FILE = "prompts.json"


class SavedSample(NamedTuple):
    """A sample's entry in `prompts.json`, and its decoded file."""

    entry: dict[str, Any]
    clip: Clip


def write_samples(
    pipeline: Pipeline,
    requests: Sequence[Request],
    folder: str | Path,
    *,
    sampling: Sampling | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Sample all requests into `folder`: one file each (mp4; png for one frame), and `prompts.json`, which is returned.

    `read_requests` reads the requests from `prompts.json`; their pictures and noise are in `inputs/`. The folder is
    complete or absent; samples in it are replaced. `progress` is called with the number of finished clips; `sampling`
    is the pipeline's own by default. In a run of several processes all of them call this; the first one decodes
    and writes, and returns the entries.

    Raises:
      UserError: If the folder holds files that are not samples, or a request is invalid.
    """
    folder, count = Path(folder).absolute(), max(1, 4 * pipeline.config.batch)
    parts = [requests[start : start + count] for start in range(0, len(requests), count)]
    for part in parts:
        pipeline.check_decoding(part)
    sampled = _sample_parts(pipeline, parts, sampling)
    if not is_first_process():
        for _ in sampled:
            pass  # The first process decodes and writes the part.
        wait_for_main_process()
        return []
    check_replaceable(folder)
    entries: list[dict[str, Any]] = []
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        sized = (replace(request, size=pipeline.config.resolve_size(request)) for request in requests)
        written = [write_request(request, temporary) for request in sized]
        for part, latents in sampled:
            for request, clip in zip(part, pipeline.decode_many(latents, part), strict=True):
                slug = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:40] or "unconditional"
                name = f"{len(entries):03d}-{slug}.{'png' if len(clip.frames) == 1 else 'mp4'}"
                clip.save(temporary / name)
                entries.append({"file": name, **written[len(entries)]})
                count_progress()
                if progress is not None:
                    progress(len(entries))
        write_json(temporary / PROMPTS_FILE, entries)
    wait_for_main_process()
    return entries


def _sample_parts(
    pipeline: Pipeline, parts: Sequence[Sequence[Request]], sampling: Sampling | None
) -> Iterator[tuple[Sequence[Request], Sequence[Float32[np.ndarray, "_ _ _ c"]]]]:
    """Yield parts of the requests with their latents; before sampling, all processes wait for the first one.

    Each stage moves its weights from host memory to the devices. All latents, which are small, are sampled first, so
    that the weights move once and not for every part.
    """
    if pipeline.model_parts.offload is None:
        for part in parts:
            wait_for_main_process()
            latents_of_part = pipeline.generate_latents(part, sampling=sampling)
            count_progress()
            yield part, latents_of_part
        return
    wait_for_main_process()
    with declare_phase("sample"):
        latents = iter(pipeline.generate_latents([request for part in parts for request in part], sampling=sampling))
    for part in parts:
        yield part, [next(latents) for _ in part]


def check_replaceable(folder: Path) -> None:
    """Check that a folder holds nothing other than samples, so that new ones may replace it.

    Raises:
      UserError: If the folder holds other files.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder for the samples")
    inputs = folder / INPUTS_FOLDER
    paths = [path for path in folder.iterdir() if path != inputs or not path.is_dir()]
    paths += inputs.iterdir() if inputs.is_dir() else ()
    present = {path.relative_to(folder).as_posix() for path in paths if not path.name.startswith(".")}
    written = read_json(folder / PROMPTS_FILE) if PROMPTS_FILE in present else []
    samples = [entry for entry in written if isinstance(entry, dict) and "file" in entry]
    expected = {PROMPTS_FILE, *(file for entry in samples for file in list_files(entry))} if samples else set()
    if foreign := sorted(present - expected):
        raise UserError(f"{folder} holds other files than samples, such as {foreign[0]}; use another folder")


def list_samples(folder: str | Path) -> list[tuple[str, str]]:
    """Return the prompt and the file name of each sample that `prompts.json` lists.

    Raises:
      MissingError: If there is no `prompts.json`.
      UserError: If the file is not a list of samples in the folder, or names a file twice.
    """
    path = Path(folder) / PROMPTS_FILE
    entries = read_json(path)
    fix = "Use a folder that experiments/sample.py --prompts wrote"
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} is no list of samples. {fix}")
    samples: dict[str, str] = {}
    for number, entry in enumerate(entries):
        values = entry if isinstance(entry, dict) else {}
        prompt, name = values.get("prompt"), values.get("file")
        if not isinstance(prompt, str) or not isinstance(name, str):
            raise UserError(f"{path}: entry {number} is invalid: a sample has a prompt and a file. {fix}")
        if name in samples or Path(name).is_absolute() or ".." in Path(name).parts:
            rule = "two samples have this file" if name in samples else "it is a file of another folder"
            raise UserError(f"{path}: file={name!r} is invalid: {rule}. {fix}")
        samples[name] = prompt
    return [(prompt, name) for name, prompt in samples.items()]


def read_samples(folder: str | Path) -> list[SavedSample]:
    """Read the samples that `prompts.json` lists, decoded from their files."""
    folder = Path(folder)
    return [
        SavedSample(entry, replace(decode(folder / entry["file"]), caption=entry["prompt"]))
        for entry in read_json(folder / PROMPTS_FILE)
    ]
