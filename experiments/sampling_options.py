"""Options of sampling that the commands share that sample a trained model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from dit_video.diffusion import AdaptiveProjectedGuidance, SkipLayerGuidance, ZeroStarGuidance
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.preparation import check_sampling


def parse_guidance(texts: Sequence[str]) -> float | tuple[float, float]:
    """Parse one scale of guidance, or two for two experts.

    Raises:
      ValueError: If there are more, or they are no numbers.
    """
    numbers = tuple(map(float, texts))
    if len(numbers) > 2:  # which tyro lets pass
        raise ValueError("more than two numbers")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


GUIDANCE_SPEC = tyro.constructors.PrimitiveConstructorSpec(
    nargs=(1, 2),
    metavar="FLOAT [FLOAT]",
    instance_from_str=parse_guidance,
    is_instance=lambda value: value is None or isinstance(value, float | int | tuple),
    str_from_instance=lambda value: [str(each) for each in (value if isinstance(value, tuple) else (value,))],
)
"""Rule for an option of one scale of guidance, or of two for two experts."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Values that replace those of a model's own sampling; None keeps the model's."""

    steps: int | None = None
    """Number of sampling steps; the model's own by default."""
    guidance: Annotated[float | tuple[float, float] | None, GUIDANCE_SPEC] = None
    """Guidance scale, where 1 disables guidance, or one for each of two experts, noisy times first; the model's own by
    default."""
    solver: str | None = None
    """Name of the solver, such as euler, heun, unipc, dpm++2m or ddim; the model's own by default."""
    shift: float | None = None
    """Shift of the times towards noise, such as 5 for distilled models; as in training by default."""
    times: tuple[float, ...] | None = None
    """Falling times at which the steps start, from at most 1 (noise) to above 0, instead of a number of steps."""
    interval: tuple[float, float] | None = None
    """Range of times in which guidance is applied, from 0 (data) to 1 (noise)."""
    rescale: float | None = None
    """Share, from 0 to 1, by which guided predictions get the standard deviation of those without guidance."""
    projected: bool | None = None
    """Adaptive projected guidance: drop the part that is parallel to the prediction and causes oversaturation."""
    zero_star: bool | None = None
    """CFG-Zero*: scale the unconditional prediction to the best length, and let the first step change nothing."""
    skip_layers: tuple[int, ...] = ()
    """Numbers of the layers that skip-layer guidance skips in a further prediction, which samples are led away from."""

    def make_sampling(self, config: PipelineConfig) -> Sampling:
        """Return the sampling of a model with these options.

        Raises:
          UserError: If a value is invalid, or the model cannot sample so.
        """
        own = config.sampling.guidance
        changes: dict[str, Any] = {"interval": self.interval, "rescale": self.rescale}
        changes = {name: value for name, value in changes.items() if value is not None}
        if self.projected is not None:
            changes["projection"] = AdaptiveProjectedGuidance() if self.projected else None
        if self.zero_star is not None:
            changes["zero_star"] = ZeroStarGuidance() if self.zero_star else None
        if self.skip_layers:
            changes["skip_layers"] = SkipLayerGuidance(layers=self.skip_layers)
        scale = own.scale if self.guidance is None else self.guidance
        sampling = config.sampling.change(
            config.model.process,
            steps=self.steps,
            guidance=replace(own, scale=scale, **changes),
            solver=self.solver,
            shift=self.shift,
            times=self.times,
        )
        check_sampling(config, sampling)
        return sampling
