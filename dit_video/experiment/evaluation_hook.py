"""Evaluation during the training of a denoiser, whose steps go on while its samples are measured."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from dit_video.distributed.gather import is_first_process
from dit_video.evaluation.config import Evaluation
from dit_video.evaluation.evaluate import measure_samples
from dit_video.evaluation.requests import EvaluationClips, EvaluationRequest
from dit_video.sampling.pipeline import Pipeline
from dit_video.training.hooks.hook import Hook


class EvaluationHook(Hook):
    """Samples of the averaged weights at an interval of steps, and their metrics in `step_STEP/metrics.json`.

    All processes sample together. The first one decodes and measures in a thread of its own, for which neither the
    others nor the training wait; the values are logged with the next entry after they are known. Metrics that need
    the denoiser itself are left out, since its weights go on changing.

    Args:
      folder: folder of the evaluations.
      every: interval in steps.
      evaluation: prompts and metrics.
      clips: clips of the training.
      make_pipeline: returns a pipeline from averaged weights, which stay where they are on the devices.
    """

    name = "evaluate"

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        evaluation: Evaluation,
        clips: EvaluationClips,
        make_pipeline: Callable[[Any], Pipeline],
    ):
        self._folder, self._every, self._evaluation, self._clips = folder, every, evaluation, clips
        self._make_pipeline = make_pipeline
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evaluation")
        self._pending: list[Future[dict[str, float]]] = []

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Return True at the interval; after the last step the run is evaluated as a whole."""
        return step % self._every == 0

    def call(self, step: int, state: Any) -> Mapping[str, float]:
        """Sample, and let the first process measure."""
        pipeline = self._make_pipeline(state.ema)
        image = pipeline.config.frame_conditioning
        requests = self._evaluation.make_requests(self._clips, 0, image=image is not None and image.prob == 1)
        latents = pipeline.generate_latents([each.request for each in requests])
        if is_first_process():
            self._pending.append(self._executor.submit(self._measure, step, pipeline, requests, latents))
        return {}

    def derive(self, values: Mapping[str, float]) -> Mapping[str, float]:
        """Return the values of the evaluations that have ended since the last entry.

        Raises:
          UserError: of an evaluation that failed.
        """
        ended = [each for each in self._pending if each.done()]
        self._pending = [each for each in self._pending if not each.done()]
        return {name: value for each in ended for name, value in each.result().items()}

    def close(self) -> None:
        """Wait for the evaluations that have not ended."""
        self._executor.shutdown(wait=True)
        for each in self._pending:
            each.result()

    def _measure(
        self,
        step: int,
        pipeline: Pipeline,
        requests: Sequence[EvaluationRequest],
        latents: Sequence[Float32[np.ndarray, "_ _ _ c"]],
    ) -> dict[str, float]:
        # Decoding reads the autoencoder alone: the denoiser's weights are those of a later step by now.
        clips = pipeline.decode_many(latents, [each.request for each in requests])
        folder, sampling = self._folder / f"step_{step}", pipeline.resolve_sampling()
        results = measure_samples(self._evaluation, requests, clips, folder, sampling=sampling)
        known = {name: each.estimate.value for name, each in results.items() if each.estimate.value is not None}
        return {f"evaluation_{name}": value for name, value in known.items()} | {"evaluation_step": float(step)}
