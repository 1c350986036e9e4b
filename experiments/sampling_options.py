"""Options of sampling that the commands share that sample a trained model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import tyro

from dit_video.diffusion import TEXT, SkipLayerGuidance, get_guidance_method
from dit_video.diffusion.guidance import Scale
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.preparation import check_sampling
from dit_video.sampling.sampling_config import make_guidance


def parse_guidance(texts: Sequence[str]) -> Scale | dict[str, Scale]:
    """Parse the prompt's scale of guidance, or two for two experts; or scales of conditions, such as `motion=3`.

    Raises:
      ValueError: If there are more numbers, or they are none.
    """
    if any("=" in text for text in texts):
        pairs = (text.partition("=") for text in texts)
        return {name: _parse_scale(value.split(",")) for name, _, value in pairs}
    return _parse_scale(texts)


def _parse_scale(texts: Sequence[str]) -> Scale:
    numbers = tuple(map(float, texts))
    if len(numbers) not in (1, 2):  # which tyro lets pass
        raise ValueError("more than two numbers" if numbers else "no number")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def format_scales(scales: Mapping[str, Scale]) -> list[str]:
    """Return scales of guidance as the words that `parse_guidance` reads."""
    values = {name: np.atleast_1d(scale).tolist() for name, scale in scales.items()}
    if list(values) == [TEXT]:
        return list(map(str, values[TEXT]))
    return [f"{name}={','.join(map(str, each))}" for name, each in values.items()]


GUIDANCE_SPEC = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="FLOAT [FLOAT] | NAME=FLOAT[,FLOAT] …",
    instance_from_str=parse_guidance,
    is_instance=lambda value: value is None or isinstance(value, float | int | tuple | Mapping),
    str_from_instance=lambda value: format_scales(value if isinstance(value, Mapping) else {TEXT: value}),
)
"""Rule for an option of the prompt's scale of guidance, of two for two experts, or of scales of several conditions."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Values that replace those of a model's own sampling; None keeps the model's."""

    steps: int | None = None
    """Number of sampling steps; the model's own by default."""
    guidance: Annotated[Scale | dict[str, Scale] | None, GUIDANCE_SPEC] = None
    """Guidance scale, where 1 disables guidance, or one for each of two experts, noisy times first; or scales of
    conditions by their names, such as text=5 image=2; the model's own by default."""
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
    guidance_method: str | None = None
    """Name of the method of guidance: cfg; apg, adaptive projected guidance, without the part of a step that causes
    oversaturation; cfg-zero-star, whose first step changes nothing; or that of an installed package."""
    skip_layers: tuple[int, ...] = ()
    """Numbers of the layers that skip-layer guidance skips in a further prediction, which samples are led away from."""

    def make_sampling(self, config: PipelineConfig) -> Sampling:
        """Return the sampling of a model with these options.

        Raises:
          UserError: If a value is invalid, or the model cannot sample so.
        """
        changes: dict[str, Any] = {"interval": self.interval, "rescale": self.rescale}
        changes = {name: value for name, value in changes.items() if value is not None}
        if self.guidance_method is not None:
            changes["method"] = get_guidance_method(self.guidance_method)
        if self.skip_layers:
            changes["skip_layers"] = SkipLayerGuidance(layers=self.skip_layers)
        own = config.sampling.guidance
        own = own if self.guidance is None else make_guidance(self.guidance, base=own)
        sampling = config.sampling.change(
            config.model.process,
            steps=self.steps,
            guidance=replace(own, **changes),
            solver=self.solver,
            shift=self.shift,
            times=self.times,
        )
        check_sampling(config, sampling)
        return sampling
