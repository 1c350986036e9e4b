"""Options of the weights, devices and memory that the commands share that sample a trained model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from sampling_options import SamplingOptions

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
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.preparation import check_requests
from dit_video.sampling.request import Request

_TILES = ("height", "width", "overlap")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Weights of a model, and the devices and memory that they take; None keeps the model's own."""

    lora: tuple[str, ...] = ()
    """LoRA files to attach, each FILE, FILE@SCALE or FILE@SCALE@EXPERT (backbone or low_noise, of two experts)."""
    step: int | None = None
    """Step of the checkpoint of a run to load; the finished weights, or the newest checkpoint, by default."""
    ema: float | None = None
    """Decay of the weight average to load from a run; 0 loads the raw weights."""
    sigma_rel: float | None = None
    """Relative width of a post-hoc average, reconstructed from the snapshots of a run."""
    parallel: str | None = None
    """Devices that sample together, such as data=2,context=4 for branches of guidance and tokens, and perhaps
    context_attention=ring; by default one, or those of all processes."""
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
        self,
        run: Path,
        sampling: SamplingOptions,
        *,
        list_requests: Callable[[PipelineConfig], Sequence[Request]] = lambda config: (),
        text_encoder: Path | None = None,
        image_encoder: Path | None = None,
    ) -> Pipeline:
        """Load the pipeline of a run, a pipeline folder or open weights with the chosen weights.

        Before any weight is read, adapters, sampling and requests are checked against the folder's config.

        Args:
          run: The folder.
          sampling: Options of sampling.
          list_requests: Returns requests that will be sampled.
          text_encoder: Folder of the frozen text encoder, if it has been moved.
          image_encoder: Folder of the image encoder, if it has been moved.

        Raises:
          UserError: If there is less than one step, if `parallel` is not AXIS=SIZE,…, if an adapter, the sampling or a
            request does not fit the model, or if `dit_video.load` refuses the model.
        """
        check_minimum(1, steps=sampling.steps)
        adapters = [AdapterFile.parse(text) for text in self.lora]
        parallel = None if self.parallel is None else parse_parallelism(self.parallel)
        memory = None if self.decode_memory is None else parse_memory(self.decode_memory)
        tiles = None if self.decode_tiles is None else Tiles(**dict(zip(_TILES, self.decode_tiles, strict=True)))
        dtypes: dict[str, Any] = {"dtype": self.dtype, "text_dtype": self.text_dtype}
        if self.cache:
            enable_compilation_cache()
        folder = find_folder(run)
        encoders: dict[str, Any] = {"text_encoder": text_encoder, "image_encoder": image_encoder}
        config = read_config(folder, **encoders, **dtypes)
        if config is not None:
            for file, _, expert in adapters:
                check_adapter(file, config, get_lora_modules, expert=expert)
            check_requests(config, list_requests(config), sampling.make_sampling(config))
        options: dict[str, Any] = {"step": self.step, "ema": self.ema, "sigma_rel": self.sigma_rel}
        options["attention"] = self.attention
        options["offload"] = OFFLOADS.get(self.offload, "auto")
        if parallel is None and jax.process_count() > 1:
            parallel = Parallelism()
        pipeline = dit_video.load(folder, parallel=parallel, **encoders, **dtypes, **options)
        if memory is not None or tiles is not None:
            pipeline = pipeline.with_decoding(memory=memory, tiles=tiles)
        for file, scale, expert in adapters:
            pipeline = pipeline.load_lora(file, scale, expert=expert)
        return pipeline
