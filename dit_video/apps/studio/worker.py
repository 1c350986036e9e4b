"""The thread that samples the jobs of the queue."""

import logging
import threading
from collections.abc import Callable

from dit_video.apps.studio.code import format_command, format_python
from dit_video.apps.studio.gallery import Gallery
from dit_video.apps.studio.jobs import Job, JobQueue, StepTimer
from dit_video.apps.studio.models import StudioModel
from dit_video.apps.studio.notes import collect_notes
from dit_video.apps.studio.preview import Previewer
from dit_video.apps.studio.submission import Submission
from dit_video.core.errors import UserError
from dit_video.sampling.progress import PipelineProgress, SamplingCancelled
from dit_video.video import Clip

_LOG = logging.getLogger(__name__)


class Worker(threading.Thread):
    """A thread that samples one job after the other, as one device does.

    Args:
      model: the model.
      queue: jobs of all users.
      open_gallery: function that returns a user's gallery.
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
            pipeline.generate_many([self._model.make_example()], steps=1, callback=lambda progress: None)
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
            clips = pipeline.run_tasks(tasks, seeds=seeds, callback=report, **submission.overrides)
        self._queue.update(job, notes=tuple(dict.fromkeys((*job.notes, *notes))))
        self._previewer.learn(self._model.config.autoencoder.stride, clips)
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
