"""Options that the commands share that sample a trained model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dit_video
from dit_video.core.command_line import check_minimum
from dit_video.distributed.mesh import parse_mesh
from dit_video.nn.attention import BackendName
from dit_video.pipelines.pipeline import Pipeline
from dit_video.platform.compilation_cache import enable_compilation_cache


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Weights of the model, and values that replace those of its own sampling; None keeps the model's."""

    steps: int | None = None
    """Number of sampling steps; the model's own by default."""
    guidance: float | None = None
    """Guidance scale, where 1 disables guidance; the model's own by default."""
    sampler: str | None = None
    """Name of the sampler, such as euler, heun, unipc, dpm++2m or ddim; the model's own by default."""
    interval: tuple[float, float] | None = None
    """Range of times in which guidance is applied, from 0 (data) to 1 (noise)."""
    rescale: float | None = None
    """Share, from 0 to 1, by which guided predictions get the standard deviation of those without guidance."""
    projected: bool | None = None
    """Adaptive projected guidance: drop the part that is parallel to the prediction and causes oversaturation."""
    ema: float | None = None
    """Decay of the weight average to load from a run; 0 loads the raw weights."""
    sigma_rel: float | None = None
    """Relative width of a post-hoc average, reconstructed from the snapshots of a run."""
    mesh: str | None = None
    """Devices that sample together, such as data=2,context=4 for branches of guidance and tokens; one by default."""
    attention: BackendName | None = None
    """Backend of attention instead of the model's own; auto takes the best one for the devices."""
    cache: bool = True
    """Keep compiled programs in ~/.cache/dit_video/programs, so that the next start is faster."""

    def load_pipeline(self, run: Path, *, text_encoder: Path | None = None) -> Pipeline:
        """Load the pipeline of a run, a pipeline folder or open weights with the chosen weights.

        Raises:
          UserError: a number of steps below 1, a mesh that is not AXIS=SIZE,…, or what `dit_video.load` refuses.
        """
        check_minimum(1, steps=self.steps)
        if self.cache:
            enable_compilation_cache()
        mesh = None if self.mesh is None else parse_mesh(self.mesh)
        options: dict[str, Any] = {"ema": self.ema, "sigma_rel": self.sigma_rel, "attention": self.attention}
        return dit_video.load(run, text_encoder=text_encoder, mesh=mesh, **options)

    def make_overrides(self, pipeline: Pipeline) -> dict[str, Any]:
        """Return the arguments `steps`, `guidance` and `sampler` of the pipeline's methods."""
        guidance = pipeline.config.sampling.override_guidance(
            scale=self.guidance, interval=self.interval, rescale=self.rescale, projected=self.projected
        )
        return {"steps": self.steps, "guidance": guidance, "sampler": self.sampler}
