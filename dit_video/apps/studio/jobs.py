"""Jobs of all users, and the order in which they are sampled."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from dit_video.apps.studio.uploads import make_id
from dit_video.core.errors import MissingError, UserError

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
          QueueFullError: the user has as many as are allowed.
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
          MissingError: the user has no such job.
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
          MissingError: the user has no such job.
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
