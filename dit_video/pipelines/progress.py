"""Progress of sampling, as a pipeline reports it after every few steps."""

from collections.abc import Callable
from typing import NamedTuple

from dit_video.core.errors import UserError
from dit_video.generation import Monitor, SamplingProgress
from dit_video.generation.edit_paths import EditProgress
from dit_video.video import Clip


class SamplingCancelled(UserError):
    """Sampling was cancelled by its callback."""


class PipelineProgress(NamedTuple):
    """The progress of the clips that are sampled together."""

    progress: SamplingProgress | EditProgress
    decode: Callable[..., Clip]

    @property
    def step(self) -> int:
        """Return the number of steps that are done."""
        return self.progress.step

    @property
    def steps(self) -> int:
        """Return the number of all steps."""
        return self.progress.steps

    @property
    def requests(self) -> tuple[int, ...]:
        """Return the numbers of the requests that are sampled together."""
        return self.progress.requests

    def preview(self) -> dict[int, Clip]:
        """Return the clips that the steps lead to, by the numbers of their requests; decoding takes time."""
        return {index: self.decode(latents) for index, latents in self.progress.estimate_latents().items()}

    def cancel(self) -> None:
        """End the sampling.

        Raises:
          SamplingCancelled: always.
        """
        raise SamplingCancelled(f"sampling was cancelled after step {self.step} of {self.steps}")


Callback = Callable[[PipelineProgress], object]
"""Function that is called with the progress."""


def make_monitor(callback: Callback | None, decode: Callable[..., Clip], *, block_steps: int = 4) -> Monitor | None:
    """Return the sampler's monitor that calls a callback; None without one."""
    report = make_report(callback, decode)
    return None if report is None else Monitor(report, block_steps)


def make_report(
    callback: Callback | None, decode: Callable[..., Clip]
) -> Callable[[SamplingProgress | EditProgress], object] | None:
    """Return the function that calls a callback with the progress of sampling or of an edit; None without one."""
    return None if callback is None else lambda progress: callback(PipelineProgress(progress, decode))
