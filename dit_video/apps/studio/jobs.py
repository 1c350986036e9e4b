"""Jobs of all users: the queue in which they wait, and the thread that samples them, with previews and notes."""

import contextlib
import io
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

from dit_video.apps.studio.gallery import Gallery
from dit_video.apps.studio.models import StudioModel
from dit_video.apps.studio.submission import Submission, format_command, format_python
from dit_video.apps.studio.uploads import make_id
from dit_video.core.errors import MissingError, UserError
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.preview import PreviewDecoder, PreviewFit
from dit_video.sampling.progress import PipelineProgress, SamplingCancelled
from dit_video.tokens import Grid
from dit_video.video import Clip

MAX_JOBS = 8
"""Maximum number of jobs of a user that wait or run."""
MAX_FINISHED = 20
"""Number of finished jobs of a user that the page lists."""
ABSENT_SECONDS = 120.0
"""Seconds without a page or a request after which a user counts as one who has left."""
Status = Literal["waiting", "preparing", "sampling", "decoding", "done", "failed", "cancelled"]
_ACTIVE = ("waiting", "preparing", "sampling", "decoding")


class QueueFullError(UserError):
    """A user has as many jobs as are allowed."""


@dataclass(kw_only=True)
class Job:
    """A job of a user. The queue's lock guards its state."""

    user: str
    tab: str
    title: str
    """Prompt, or a description of the task."""
    content: Any
    """Task and sampling of the job, a `Submission`; None once it is finished."""
    id: str = field(default_factory=make_id)
    status: Status = "waiting"
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    preview: bytes = b""
    """Newest preview, an animated WebP."""
    preview_version: int = 0
    error: str = ""
    notes: tuple[str, ...] = ()
    """Warnings about the job."""
    items: tuple[str, ...] = ()
    """Identifiers of the results in the user's gallery."""
    is_cancelled: bool = False

    @property
    def is_active(self) -> bool:
        """Return whether the job waits or runs."""
        return self.status in _ACTIVE

    def describe(self, ahead: int) -> dict[str, Any]:
        """Return the state for the page, with the number of jobs before this one."""
        names = ("id", "tab", "title", "status", "step", "steps", "seconds_left", "error")
        described = {name: getattr(self, name) for name in names}
        return described | {
            "ahead": ahead,
            "preview": self.preview_version,
            "items": list(self.items),
            "notes": list(self.notes),
        }


class JobQueue:
    """A queue that serves users in turn: the one who was served longest ago is next, with the oldest of their jobs.

    Users whose pages are open come before those who have left, whose jobs are kept. Pages in the background, which
    ask for the state now and then, count as open.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: dict[str, Job] = {}
        self._served: dict[str, int] = {}
        self._turn = 0
        self._pages: dict[str, int] = {}
        self._contacts: dict[str, float] = {}
        self._versions: dict[str, int] = {}
        self._galleries: dict[str, int] = {}
        self._is_closed = False

    def submit(self, job: Job) -> None:
        """Add a job.

        Raises:
          QueueFullError: If the user has as many jobs as are allowed.
        """
        with self._changed:
            if sum(each.is_active for each in self._list(job.user)) >= MAX_JOBS:
                raise QueueFullError(f"{MAX_JOBS} clips are waiting already. Cancel one, or wait for one to finish.")
            self._jobs[job.id] = job
            finished = [each for each in self._list(job.user) if not each.is_active]
            for old in finished[: max(0, len(finished) - MAX_FINISHED)]:
                del self._jobs[old.id]
            self._mark_all()

    def take(self) -> Job | None:
        """Wait for the next job, and return it as one that is being prepared; None once the queue is closed."""
        with self._changed:
            while not self._is_closed:
                if (job := next(self._iterate_waiting(), None)) is not None:
                    self._turn += 1
                    self._served[job.user] = self._turn
                    job.status = "preparing"
                    self._mark_all()
                    return job
                self._changed.wait()
            return None

    def update(self, job: Job, **values: Any) -> None:
        """Set attributes of a job."""
        with self._changed:
            for name, value in values.items():
                setattr(job, name, value)
            if "items" in values:
                self._galleries[job.user] = self._galleries.get(job.user, 0) + 1
            if job.is_active:
                self._mark(job.user)
            else:
                job.content = None  # its clips may be large
                self._mark_all()

    def cancel(self, user: str, job: str) -> None:
        """Cancel a job that waits or runs, or take a finished one off the list.

        Raises:
          MissingError: If the user has no such job.
        """
        with self._changed:
            chosen = self.get(user, job)
            if chosen.status == "waiting":
                chosen.status, chosen.is_cancelled, chosen.content = "cancelled", True, None
            elif chosen.is_active:
                chosen.is_cancelled = True
            else:
                del self._jobs[job]
            self._mark_all()

    def get(self, user: str, job: str) -> Job:
        """Return a job of a user.

        Raises:
          MissingError: If the user has no such job.
        """
        chosen = self._jobs.get(job)
        if chosen is None or chosen.user != user:
            raise MissingError("this job does not exist, or has been removed.")
        return chosen

    def describe(self, user: str) -> tuple[int, dict[str, Any]]:
        """Return the version of a user's state, which grows with every change, and the state for the page."""
        with self._changed:
            order = {job.id: number for number, job in enumerate(self._iterate_waiting())}
            is_busy = any(job.is_active and job.status != "waiting" for job in self._jobs.values())
            described = [job.describe(order[job.id] + is_busy if job.id in order else 0) for job in self._list(user)]
            state = {"jobs": described, "waiting": len(order), "gallery": self._galleries.get(user, 0)}
            return self._versions.get(user, 0), state

    def get_version(self, user: str) -> int:
        """Return the version of a user's state."""
        return self._versions.get(user, 0)

    @property
    def is_closed(self) -> bool:
        """Return whether `close` has been called."""
        return self._is_closed

    def mark_gallery(self, user: str) -> None:
        """Have the pages of a user fetch the gallery again."""
        with self._changed:
            self._galleries[user] = self._galleries.get(user, 0) + 1
            self._mark(user)

    def open_page(self, user: str) -> None:
        """Note that a page of a user is open."""
        with self._changed:
            self._pages[user] = self._pages.get(user, 0) + 1
            self._mark_all()

    def close_page(self, user: str) -> None:
        """Note that a page of a user has been closed."""
        with self._changed:
            self._pages[user] -= 1
            self._contacts[user] = time.monotonic()
            self._mark_all()

    def note_contact(self, user: str) -> None:
        """Note that a page of a user asked for the state."""
        self._contacts[user] = time.monotonic()

    def close(self) -> None:
        """End `take`, and cancel the job that runs."""
        with self._changed:
            self._is_closed = True
            for job in self._jobs.values():
                job.is_cancelled = True
            self._mark_all()
            self._changed.notify_all()

    def _list(self, user: str) -> list[Job]:
        return [job for job in self._jobs.values() if job.user == user]

    def _iterate_waiting(self) -> Iterator[Job]:
        """Yield the waiting jobs in the order in which they would be taken if none came and nobody left."""
        waiting: dict[str, list[Job]] = {}
        for job in self._jobs.values():
            if job.status == "waiting":
                waiting.setdefault(job.user, []).append(job)
        served, turn = dict(self._served), self._turn
        while waiting:
            user = min(waiting, key=lambda user: (not self._is_present(user), served.get(user, 0)))
            yield waiting[user].pop(0)
            if not waiting[user]:
                del waiting[user]
            turn += 1
            served[user] = turn

    def _is_present(self, user: str) -> bool:
        last_contact = self._contacts.get(user)
        is_recent = last_contact is not None and time.monotonic() - last_contact < ABSENT_SECONDS
        return bool(self._pages.get(user)) or is_recent

    def _mark(self, user: str) -> None:
        self._versions[user] = self._versions.get(user, 0) + 1
        self._changed.notify_all()

    def _mark_all(self) -> None:
        for user in {job.user for job in self._jobs.values()} | self._pages.keys():
            self._mark(user)


_LOG = logging.getLogger(__name__)


class Worker(threading.Thread):
    """A thread that samples one job after the other, as one device does.

    Args:
      model: The model.
      queue: Jobs of all users.
      open_gallery: Function that returns a user's gallery.
    """

    def __init__(self, model: StudioModel, queue: JobQueue, open_gallery: Callable[[str], Gallery]):
        super().__init__(name="studio worker", daemon=True)
        self._model, self._queue, self._open_gallery = model, queue, open_gallery
        self._previewer = Previewer()

    def run(self) -> None:
        """Load the model, compile the program of its own size, and sample jobs until the queue is closed."""
        if self._model.is_trained:  # the device may be that of the training
            self._compile_example()
        while (job := self._queue.take()) is not None:
            self.run_job(job)

    def _compile_example(self) -> None:
        try:
            pipeline = self._model.load(None, {})
            # One step compiles the program of any number of them; the callback has it compiled for blocks of steps.
            sampling = pipeline.make_sampling(steps=1)
            pipeline.generate_many([self._model.make_example()], sampling=sampling, callback=lambda progress: None)
        except Exception as error:  # of any part: jobs report it
            _LOG.warning("the model cannot be prepared: %s", error)

    def run_job(self, job: Job) -> None:
        """Sample a job, and add its clips to the gallery of its user."""
        try:
            clips = self._sample(job)
            if job.is_cancelled:
                raise SamplingCancelled("cancelled while the clip was decoded")
            items = [self._store(job, clip, seed) for clip, seed in zip(clips, job.content.seeds, strict=True)]
        except SamplingCancelled:
            self._queue.update(job, status="cancelled")
        except UserError as error:
            self._queue.update(job, status="failed", error=str(error))
        except Exception as error:  # of any part: the thread serves the next user
            _LOG.exception("job %s failed", job.id)
            text = f"The program failed ({type(error).__name__}). The server's log says more."
            self._queue.update(job, status="failed", error=text)
        else:
            self._queue.update(job, status="done", items=tuple(items), seconds_left=None)

    def _sample(self, job: Job) -> list[Clip]:
        submission: Submission = job.content
        pipeline = self._previewer.start(self._model.load(submission.checkpoint, submission.scales))
        timer = StepTimer()

        def report(progress: PipelineProgress) -> None:
            if job.is_cancelled:
                progress.cancel()
            preview = self._previewer.make_preview(progress)
            status = "decoding" if progress.step == progress.steps else "sampling"
            seconds = timer.estimate(progress.step, progress.steps)
            values = {} if preview is None else {"preview": preview, "preview_version": job.preview_version + 1}
            self._queue.update(
                job, status=status, step=progress.step, steps=progress.steps, seconds_left=seconds, **values
            )

        tasks, seeds = [submission.task] * len(submission.seeds), submission.seeds
        with collect_notes() as notes:
            pictures: dict[str, Any] = {name: [value] * len(tasks) for name, value in submission.pictures.items()}
            clips = pipeline.run(tasks, seed=seeds, callback=report, **submission.options, **pictures)
        self._queue.update(job, notes=tuple(dict.fromkeys((*job.notes, *notes))))
        self._previewer.learn(self._model.config.model.autoencoder.stride, clips)
        return clips

    def _store(self, job: Job, clip: Clip, seed: int) -> str:
        submission: Submission = job.content
        model, adapters = str(self._model.folder), self._model.adapters
        values = {
            "tab": submission.tab.name,
            "tab_title": submission.tab.title,
            "title": submission.title,
            "seed": seed,
            "notes": list(job.notes),
            "values": submission.answers["values"],
            "sampling": {**submission.answers["sampling"], "seed": seed, "count": 1},
            "python": format_python(submission, model, seed, adapters),
            "command": format_command(submission, model, seed, adapters),
        }
        return self._open_gallery(job.user).add(clip, values, submission.inputs)


class StepTimer:
    """An estimate of the time that the remaining steps of a job take, from those after the first report."""

    def __init__(self) -> None:
        self._start: tuple[int, float] | None = None
        self._last_step = 0

    def estimate(self, step: int, steps: int) -> float | None:
        """Return the seconds that remain; None at first, whose time includes compilation, and for repeated steps."""
        now = time.perf_counter()
        if self._start is None or step < self._last_step:
            self._start = step, now
        self._last_step = step
        first, start = self._start
        return None if step == first else (now - start) / (step - first) * (steps - step)


_MAX_PREVIEW_SIDE = 320
"""Maximum pixels of a side of a preview."""
_MAX_PREVIEW_FRAMES = 48
"""Maximum number of frames of a preview, evenly spaced."""
_MIN_PREVIEW_SECONDS = 0.15
"""Minimum seconds between two previews of a job."""


class Previewer:
    """The previews of a model: by its own preview decoder, or by one that is fitted to the clips that it makes."""

    def __init__(self) -> None:
        self._fit: PreviewFit | None = None
        self._decoder: PreviewDecoder | None = None
        self._last_time = 0.0
        self._latents: dict[int, np.ndarray] | None = None

    def start(self, pipeline: Pipeline) -> Pipeline:
        """Begin a job, and return the pipeline with the fitted preview decoder if it has none of its own."""
        self._last_time = 0.0
        self._latents = {} if pipeline.preview_decoder is None else None
        return pipeline if self._latents is None else pipeline.with_preview_decoder(self._decoder)

    def make_preview(self, progress: PipelineProgress) -> bytes | None:
        """Return a preview of the first clip of a job; None if there is no decoder, or the last one is too recent."""
        is_last = progress.step == progress.steps
        if is_last and self._latents is not None:
            self._latents |= progress.progress.estimate_latents()
        is_recent = time.perf_counter() - self._last_time < _MIN_PREVIEW_SECONDS
        if progress.preview_decoder is None or is_last or is_recent:
            return None
        clips = progress.quick_preview(max_side=_MAX_PREVIEW_SIDE)
        self._last_time = time.perf_counter()
        return encode_preview(clips[min(clips)])

    def learn(self, stride: Grid, clips: Sequence[Clip]) -> None:
        """Fit the preview decoder to finished clips of a model that has none, so that the next job has previews.

        Clips that a task has changed since they were decoded are left out.

        Args:
          stride: Stride of the autoencoder.
          clips: Clips of the job.
        """
        for number, latents in (self._latents or {}).items():
            t, h, w, channels = latents.shape
            size = (1 + (t - 1) * stride.t, h * stride.h, w * stride.w)
            if number < len(clips) and clips[number].frames.shape[:3] == size and np.isfinite(latents).all():
                self._fit = self._fit or PreviewFit(stride, channels)
                self._fit.add(latents, clips[number].frames)
                self._decoder = self._fit.solve()
        self._latents = None


def encode_preview(clip: Clip) -> bytes:
    """Return an animated WebP that repeats for ever."""
    step = -(-len(clip.frames) // _MAX_PREVIEW_FRAMES)
    pictures = [Image.fromarray(frame) for frame in clip.frames[::step]]
    buffer = io.BytesIO()
    duration = max(20, round(1000 * step / clip.fps))
    pictures[0].save(
        buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=duration, loop=0, quality=80, method=0
    )
    return buffer.getvalue()


_LOCAL = threading.local()


@contextlib.contextmanager
def collect_notes() -> Iterator[list[str]]:
    """Collect the texts of warnings in this thread, each once, after `show_warnings_as_notes` was called."""
    notes: list[str] = []
    before = getattr(_LOCAL, "notes", None)
    _LOCAL.notes = notes
    try:
        yield notes
    finally:
        _LOCAL.notes = before


def show_warnings_as_notes() -> None:
    """Have warnings become notes in threads that collect them; in others they are shown as before.

    `warnings.catch_warnings` would collect the warnings of all threads.
    """
    show = warnings.showwarning

    def show_or_collect(message: Warning | str, category: type[Warning], *arguments: Any, **options: Any) -> None:
        notes = getattr(_LOCAL, "notes", None)
        if notes is None or not issubclass(category, UserWarning):
            show(message, category, *arguments, **options)
        elif str(message) not in notes:
            notes.append(str(message))

    warnings.filterwarnings("always", category=UserWarning)  # by default a second job has none
    warnings.showwarning = show_or_collect
