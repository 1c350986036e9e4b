"""Options that the commands share that sample a trained model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

import dit_video
from dit_video.core.command_line import check_minimum, parse_memory
from dit_video.core.offload import OFFLOADS
from dit_video.core.platform.compilation_cache import enable_compilation_cache
from dit_video.distributed.mesh import Parallelism, parse_parallelism
from dit_video.families.denoisers import get_lora_modules
from dit_video.families.family import Dtype
from dit_video.loading import find_folder, read_config
from dit_video.models.autoencoders import Tiles
from dit_video.nn.attention import BackendName
from dit_video.sampling.adapters import AdapterFile, check_adapter
from dit_video.sampling.pipeline import Pipeline, Request
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.preparation import check_requests


def _parse_guidance(texts: Sequence[str]) -> float | tuple[float, float]:
    numbers = tuple(map(float, texts))
    if len(numbers) > 2:  # which tyro lets pass
        raise ValueError("more than two numbers")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


GUIDANCE_SPEC = tyro.constructors.PrimitiveConstructorSpec(
    nargs=(1, 2),
    metavar="FLOAT [FLOAT]",
    instance_from_str=_parse_guidance,
    is_instance=lambda value: value is None or isinstance(value, float | int | tuple),
    str_from_instance=lambda value: [str(each) for each in (value if isinstance(value, tuple) else (value,))],
)
"""Rule for an option of one scale of guidance, or of two for two experts."""

_TILES = ("height", "width", "overlap")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Weights of the model, and values that replace its own for sampling; None keeps the model's."""

    steps: int | None = None
    """Number of sampling steps; the model's own by default."""
    guidance: Annotated[float | tuple[float, float] | None, GUIDANCE_SPEC] = None
    """Guidance scale, where 1 disables guidance, or one for each of two experts, noisy times first; the model's own by
    default."""
    sampler: str | None = None
    """Name of the sampler, such as euler, heun, unipc, dpm++2m or ddim; the model's own by default."""
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
    lora: tuple[str, ...] = ()
    """LoRA files to attach, each FILE, FILE@SCALE or FILE@SCALE@EXPERT (backbone or low_noise, of two experts)."""
    step: int | None = None
    """Step of the checkpoint of a run to load; the finished weights, or the newest checkpoint, by default."""
    ema: float | None = None
    """Decay of the weight average to load from a run; 0 loads the raw weights."""
    sigma_rel: float | None = None
    """Relative width of a post-hoc average, reconstructed from the snapshots of a run."""
    parallel: str | None = None
    """Devices that sample together, such as data=2,context=4 for branches of guidance and tokens; by default one, or
    those of all processes."""
    attention: BackendName | None = None
    """Backend of attention instead of the model's own; auto takes the best one for the devices."""
    dtype: Dtype | None = None
    """Dtype of matrix products of open weights, bfloat16 by default; a run has its own."""
    text_dtype: Dtype | None = None
    """Dtype of the text encoder of open weights; the denoiser's by default."""
    offload: Literal["auto", "stages", "text-layers", "layers", "none"] = "auto"
    """Weights in host memory: all but those of the current stage, also all layers but one (of the text encoder, or of
    the denoiser too), or none; auto: by the model and the device's memory."""
    decode_memory: str | None = None
    """Memory that decoding may take besides the autoencoder, such as 4GiB; 8GiB or half of the device's by default."""
    decode_tiles: tuple[int, int, int] | None = None
    """Height, width and overlap in pixels of tiles that pictures are decoded in, such as 384 640 96, if not even one
    latent frame fits."""
    cache: bool = True
    """Keep compiled programs in ~/.cache/dit_video/programs, so that the next start is faster."""

    def load_pipeline(
        self, run: Path, *, requests: Sequence[Request] = (), text_encoder: Path | None = None
    ) -> Pipeline:
        """Load the pipeline of a run, a pipeline folder or open weights with the chosen weights.

        Before any weight is read, adapters, sampling and the requests, if any, are checked against the folder's config.

        Raises:
          UserError: If the number of steps is below 1, if `parallel` is not AXIS=SIZE,…, if an adapter or a request
            does not fit the model, or if `dit_video.load` refuses the model.
        """
        check_minimum(1, steps=self.steps)
        adapters = [AdapterFile.parse(text) for text in self.lora]
        parallel = None if self.parallel is None else parse_parallelism(self.parallel)
        memory = None if self.decode_memory is None else parse_memory(self.decode_memory)
        tiles = None if self.decode_tiles is None else Tiles(**dict(zip(_TILES, self.decode_tiles, strict=True)))
        dtypes: dict[str, Any] = {"dtype": self.dtype, "text_dtype": self.text_dtype}
        if self.cache:
            enable_compilation_cache()
        folder = find_folder(run)
        config = read_config(folder, text_encoder=text_encoder, **dtypes)
        if config is not None:
            for file, _, expert in adapters:
                check_adapter(file, config, get_lora_modules, expert=expert)
            check_requests(config, requests, **self.make_overrides(config))
        options: dict[str, Any] = {"step": self.step, "ema": self.ema, "sigma_rel": self.sigma_rel}
        options["attention"] = self.attention
        options["offload"] = OFFLOADS.get(self.offload, "auto")
        if parallel is None and jax.process_count() > 1:
            parallel = Parallelism()
        pipeline = dit_video.load(folder, text_encoder=text_encoder, parallel=parallel, **dtypes, **options)
        if memory is not None or tiles is not None:
            pipeline = pipeline.with_decoding(memory=memory, tiles=tiles)
        for file, scale, expert in adapters:
            pipeline = pipeline.load_lora(file, scale, expert=expert)
        return pipeline

    def make_overrides(self, config: PipelineConfig) -> dict[str, Any]:
        """Return the arguments of a pipeline's methods that replace values of its own sampling."""
        guidance = config.sampling.override_guidance(
            scale=self.guidance,
            interval=self.interval,
            rescale=self.rescale,
            projected=self.projected,
            zero_star=self.zero_star,
            skip_layers=self.skip_layers,
        )
        options: dict[str, Any] = {"steps": self.steps, "sampler": self.sampler, "shift": self.shift}
        return {"guidance": guidance, "times": self.times, **options}
