"""Samples that are made once: one file each, kept if a run is killed, and reused by all metrics."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.distributed.faults.progress import count_progress
from dit_video.distributed.gather import is_first_process
from dit_video.distributed.processes import wait_for_all_processes, wait_for_main_process
from dit_video.evaluation.clip_set import ClipSet, hash_clip, make_file_set
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Request

SETTINGS_FILE = "settings.json"


class SampleStore:
    """A folder of samples; existing ones are not made again.

    Args:
      folder: Folder of the samples.
      requests: One request for each sample.
      settings: JSON value of everything besides the requests that the samples depend on: weights, sampler, codec.
      suffix: Suffix of clips of several frames; images are PNG files.
      crf: Quality of the clips.

    Raises:
      UserError: If the folder holds samples of other requests or settings; the message names the differences.
    """

    def __init__(
        self,
        folder: str | Path,
        requests: Sequence[Request],
        settings: Any,
        *,
        suffix: str = "mp4",
        crf: int | None = None,
    ):
        self.folder, self._requests, self._suffix, self._crf = Path(folder), tuple(requests), suffix, crf
        listed = list(map(_describe, requests))
        # In the form that is read from the file, where tuples are lists.
        expected = json.loads(json.dumps({"settings": settings, "requests": listed}))
        path = self.folder / SETTINGS_FILE
        if path.is_file():
            if difference := _describe_difference(config_json.rewrite(read_json(path)), expected):
                raise UserError(
                    f"{self.folder} holds samples that were made otherwise: {difference}. Use another folder, or "
                    "remove this one"
                )
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} holds other files than samples. Use another folder")
        if is_first_process() and not path.is_file():
            write_json(path, expected)

    def get_path(self, number: int) -> Path:
        """Return the file of a sample."""
        size = self._requests[number].size
        is_image = size is not None and size[0] == 1
        return self.folder / f"{number:06d}.{'png' if is_image else self._suffix}"

    def list_missing(self) -> list[int]:
        """Return the numbers of the samples that do not exist yet."""
        return [number for number in range(len(self._requests)) if not self.get_path(number).is_file()]

    def fill(
        self,
        pipeline: Pipeline,
        *,
        sampling: Sampling | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Make the samples that do not exist yet; each file is complete or absent.

        In a run of several processes all of them call this, and each decodes and writes a part of the samples.

        Args:
          pipeline: The model.
          sampling: Steps, solver and guidance; the pipeline's own by default.
          progress: Called with the number of samples that exist.
        """
        wait_for_main_process()
        missing, batch = self.list_missing(), max(1, 4 * pipeline.config.batch)
        done = len(self._requests) - len(missing)
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            requests = [self._requests[number] for number in part]
            latents = pipeline.generate_latents(requests, sampling=sampling)
            count_progress()
            own = slice(jax.process_index(), None, jax.process_count())
            for number, clip in zip(part[own], pipeline.decode_many(latents[own], requests[own]), strict=True):
                clip.save(self.get_path(number), crf=self._crf if len(clip.frames) > 1 else None)
                count_progress()
            done += len(part)
            if progress is not None:
                progress(done)
        wait_for_all_processes()

    def open(self) -> ClipSet:
        """Return the samples as a set of clips."""
        names = [self.get_path(number).name for number in range(len(self._requests))]
        return make_file_set(self.folder, names, [each.prompt for each in self._requests])


def _describe_difference(old: Any, new: dict[str, Any]) -> str:
    """Return how samples were made differently; if their numbers differ, only the numbers."""
    counts = [len(each["requests"]) if isinstance(each, dict) and "requests" in each else 0 for each in (old, new)]
    if counts[0] == counts[1]:
        return config_json.describe_difference(old, new)
    settings = config_json.describe_difference(old["settings"], new["settings"], "settings") if counts[0] else ""
    return ", ".join(filter(None, (f"there are {counts[0]} samples there and {counts[1]} here", settings)))


def _describe(request: Request) -> dict[str, Any]:
    """Return all that a request asks for; the frames that it continues are given by a hash of their pixels."""
    size = None if request.size is None else list(request.size)
    known = [[each.frame, hash_clip(each.content)] for each in request.conditions]
    return {"prompt": request.prompt, "size": size, "seed": request.seed, **({"conditions": known} if known else {})}
