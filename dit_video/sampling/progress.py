"""Progress of sampling, as a pipeline reports it after every few steps."""

from collections.abc import Callable
from typing import NamedTuple

from dit_video.core.errors import UserError
from dit_video.sampling import SamplingProgress
from dit_video.sampling.edit_paths import EditProgress
from dit_video.sampling.preview import PreviewDecoder
from dit_video.video import Clip


class SamplingCancelled(UserError):
    """Sampling was cancelled by its callback."""


class PipelineProgress(NamedTuple):
    """The progress of the clips that are sampled together."""

    progress: SamplingProgress | EditProgress
    decode: Callable[..., Clip]
    """Function that decodes latents to a clip."""
    preview_decoder: PreviewDecoder | None = None
    """Preview decoder of the pipeline; None if it has none."""
    fps: float = 1.0
    """Frame rate of the clips."""

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

    def quick_preview(self, *, max_side: int | None = None) -> dict[int, Clip]:
        """Return rough pictures of the clips that `preview` returns, many times faster.

        Args:
          max_side: Maximum height and width in pixels; larger pictures are reduced by a whole number.

        Raises:
          UserError: If the pipeline has no preview decoder.
        """
        decoder = self.preview_decoder
        if decoder is None:
            raise UserError(
                "this pipeline has no preview decoder. Fit one with tools/fit_preview_decoder.py, or use preview()"
            )
        estimates = self.progress.estimate_latents()
        return {index: decoder.decode(each, fps=self.fps, max_side=max_side) for index, each in estimates.items()}

    def cancel(self) -> None:
        """End the sampling.

        Raises:
          SamplingCancelled: Always.
        """
        raise SamplingCancelled(f"sampling was cancelled after step {self.step} of {self.steps}")


Callback = Callable[[PipelineProgress], object]
"""Function that is called with the progress."""


def make_report(
    callback: Callback | None,
    decode: Callable[..., Clip],
    *,
    preview_decoder: PreviewDecoder | None = None,
    fps: float = 1.0,
) -> Callable[[SamplingProgress | EditProgress], object] | None:
    """Return the function that calls a callback with the progress of sampling or of an edit; None without one.

    Raises:
      UserError: If the callback is no function.
    """
    if callback is None:
        return None
    if not callable(callback):
        raise UserError(f"callback={callback!r} is invalid: it must be a function. Use print to see every call.")
    return lambda progress: callback(PipelineProgress(progress, decode, preview_decoder, fps))
