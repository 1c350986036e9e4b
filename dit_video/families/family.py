"""The interface of open model families: the files of their denoisers, and their pipelines."""

import abc
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.core.offload import Offload
from dit_video.diffusion import TEXT, Guidance, LogitNormal, TimeDistribution
from dit_video.distributed import Parallelism
from dit_video.families.autoencoders import check_autoencoder_weights, load_placed_autoencoder
from dit_video.families.denoiser_format import DenoiserFormat
from dit_video.models.autoencoders import AutoencoderConfig
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.conditioning import FrameConditioning
from dit_video.models.encoders import ClassNamesConfig, FrozenTextConfig, TextConfig
from dit_video.models.model_config import ModelConfig
from dit_video.sampling import Sampling
from dit_video.sampling.denoiser import EXPERTS, list_experts
from dit_video.sampling.devices import make_placement
from dit_video.sampling.loading import add_preview_decoder
from dit_video.sampling.memory import fit_offload
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import Conditioner
from dit_video.tokens import Grid
from dit_video.weights import LoadedScheduler, load_clip_image_processor, read_clip_vision_config
from dit_video.weights.clip import check_clip_weights
from dit_video.weights.parameter import Placement
from dit_video.weights.tensor_map import make_dtype_fn
from dit_video.weights.text_encoders import check_text_encoder

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")
DEFAULT_DTYPE = DTYPES[0]
DENOISER_FOLDERS = dict(zip(EXPERTS, ("transformer", "transformer_2"), strict=True))
"""Folders of a pipeline's experts in diffusers' layout."""
INDEX = "model_index.json"
"""File in a pipeline's folder that names its class and its parts."""


def read_pipeline_class(folder: Path) -> str | None:
    """Return the class that a pipeline's `model_index.json` names; None without that file, "None" without a class."""
    if not (folder / INDEX).is_file():
        return None
    index = read_json(folder / INDEX)
    return str(index.get("_class_name") if isinstance(index, dict) else None)


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options for loading a pipeline of open weights, the same as in `dit_video.load`.

    Raises:
      UserError: If a dtype is none of `DTYPES`.
    """

    text_encoder: str | os.PathLike | None = None
    """Folder of the text encoder, if it is not the pipeline's own."""
    dtype: Dtype = DEFAULT_DTYPE
    """Dtype of the denoiser's matrix products and of their weights."""
    text_dtype: Dtype | None = None
    """Dtype of the text encoder's matrix products and their weights; None for the denoiser's."""
    place: Placement | None = None
    """Function that places a parameter, given its path: `backbone/…`, `low_noise/…` for a second expert, or
    `autoencoder/…`; None to read it to the devices, or to host memory with `offload`."""
    parallel: Parallelism | None = None
    """Devices that sample together; None for one device."""
    offload: Offload | Literal["auto"] | None = "auto"
    """How weights are kept in host memory; None keeps all weights on the devices, `auto` chooses by the device's memory
    (`sampling.memory.choose_offload`)."""

    def __post_init__(self):
        for name, value in (("dtype", self.dtype), ("text_dtype", self.text_dtype or self.dtype)):
            if value not in DTYPES:
                raise UserError(
                    f"{name}={value!r} is invalid: weights are read in {' or '.join(DTYPES)}. Use one of them."
                )


class PipelineParts(NamedTuple):
    """The configs in a pipeline's folder, with the family's settings that no file holds."""

    denoiser: BackboneConfig
    autoencoder: AutoencoderConfig
    text: FrozenTextConfig | ClassNamesConfig
    schedule: LoadedScheduler
    size: Grid
    """Maximum frames, height and width of the clips that the model was trained on; one frame for a model of images,
    whose tokens have no position in time."""
    fps: float
    """Frame rate of these clips."""
    guidance: float = 5.0
    """Guidance scale that its authors sample with."""
    boundary: float | None = None
    """Boundary time between two experts: the one in `transformer` denoises at and above it, the one in `transformer_2`
    below."""
    frame_conditioning: FrameConditioning | None = None
    """Conditioning on a first frame; None for a model without it."""
    image_encoder: str | None = None
    """Folder of the image encoder whose tokens the denoiser reads."""
    conditioner: Conditioner | None = None
    """Use of images, clips and masks that its family has of its own; None for `Completion`."""
    times: TimeDistribution = LogitNormal()
    """Distribution of the diffusion times that its authors train with."""


def make_open_config(
    folder: Path,
    parts: PipelineParts,
    options: LoadOptions,
    *,
    steps: int,
    guidance: float | tuple[float, float],
    negative: str = "",
) -> PipelineConfig:
    """Return the config of a pipeline with a frozen text encoder or classes, where each clip has its own row.

    Args:
      folder: Folder of the pipeline.
      parts: The folder's configs, with the default size and schedule for sampling.
      options: Dtypes.
      steps: Number of steps that its authors sample with.
      guidance: The authors' guidance scale; one per expert if there are two.
      negative: The authors' negative prompt.
    """
    schedule = parts.schedule
    return PipelineConfig(
        model=ModelConfig(
            autoencoder=parts.autoencoder,
            backbone=parts.denoiser.replace(dtype=options.dtype),
            text_encoder=set_text_dtype(parts.text, options.text_dtype or options.dtype),
            process=schedule.process,
            prediction=schedule.prediction,
            frame_conditioning=parts.frame_conditioning,
            image_encoder=parts.image_encoder,
            fps=parts.fps,
        ),
        batch=1,
        sampling=Sampling(
            steps=steps,
            guidance=Guidance(scales={TEXT: guidance}),
            solver=schedule.solver,
            time_schedule=schedule.time_schedule,
        ),
        size=parts.size,
        negative=negative,
        boundary=parts.boundary,
        conditioner=parts.conditioner,
        provenance={"loaded from": os.fspath(folder), "class": read_pipeline_class(folder) or ""},
    )


def set_text_dtype(text: FrozenTextConfig | ClassNamesConfig, dtype: Dtype) -> FrozenTextConfig | ClassNamesConfig:
    """Return the text encoder with another dtype of its matrix products; classes have none."""
    return replace(text, dtype=dtype) if isinstance(text, FrozenTextConfig) else text


def check_channels(folder: Path, backbone: BackboneConfig, autoencoder: AutoencoderConfig) -> None:
    """Check that a pipeline's denoiser reads latents of its autoencoder.

    Raises:
      UserError: If the denoiser and the autoencoder differ in their number of latent channels.
    """
    if backbone.channels != autoencoder.channels:
        rule = f"the transformer reads latents of {backbone.channels} channels, the vae has {autoencoder.channels}"
        raise UserError(f"{folder} is invalid: {rule}. Use the autoencoder that the transformer was trained with")


def check_context_width(text_encoder: Path, width: int, backbone: Any) -> None:
    """Check that a pipeline's denoiser reads embeddings of its text encoder.

    Raises:
      UserError: If the denoiser reads embeddings of another width.
    """
    if width != backbone.context_width:
        rule = f"it makes embeddings of width {width}, the transformer reads {backbone.context_width}"
        raise UserError(f"{text_encoder} is invalid: {rule}. Use text_encoder= with the one of its training")


def find_shape(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> tuple[int, ...] | None:
    """Return the shape of the first tensor whose name, after any prefix, matches a pattern; None without one."""
    return next((shape for name, shape in shapes.items() if re.search(rf"(^|\.)({pattern})$", name)), None)


class Family(abc.ABC):
    """An open model family."""

    name: ClassVar[str]
    denoiser: ClassVar[DenoiserFormat]
    """Files of its denoisers."""
    parts: ClassVar[tuple[str, ...]]
    """Subfolders of a pipeline that are read, and downloaded from the hub."""

    pipeline_classes: ClassVar[tuple[str, ...]]
    """Classes of its pipelines in `model_index.json`."""

    def is_pipeline(self, folder: Path) -> bool:
        """Return True for the folder of a pipeline of this family."""
        return read_pipeline_class(folder) in self.pipeline_classes

    def recognize(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Return what to load instead of weights in another layout, such as a repository of the hub.

        Args:
          path: Path of the file, or of the folder that has it.
          shapes: Shapes of its tensors by name; of a pickled file none.

        Returns:
          None for weights of another family.
        """
        return None

    @abc.abstractmethod
    def make_config(self, folder: Path, options: LoadOptions) -> PipelineConfig:
        """Return the config of the pipeline in a folder, from its JSON files.

        Raises:
          MissingError: If the folder lacks parts; the message names all of them.
          UserError: If a setting is not supported, or the parts do not fit each other.
        """

    def load_pipeline(self, folder: Path, options: LoadOptions) -> Pipeline:
        """Load the pipeline in a folder; its text encoder is read at the first prompt.

        All files, and the memory that the weights take, are checked before any weight is read. Parameters are read one
        at a time, and stacks layer by layer.

        Raises:
          MissingError: If the folder lacks parts; the message names all of them.
          UserError: If a setting is not supported, or the weights do not fit the config, the device or the machine.
        """
        config = self.make_config(folder, options)
        model = config.model
        self.check_weights(folder, text=model.text_encoder, image_encoder=model.image_encoder, boundary=config.boundary)
        place, offload = options.place, None
        if place is None:
            parallel, dtype_fn = options.parallel, self.make_dtype_fn(options)
            offload = fit_offload(options.offload, config, dtype_fn, parallel=parallel, is_large=parallel is None)
            place = make_placement(parallel, offload)

        def read(expert: str) -> dict[str, Any]:
            return self.denoiser.load(
                self.find_denoiser(folder, expert),
                kernel_dtype=jnp.dtype(options.dtype),
                place=lambda path, parameter: place(f"{expert}/{path}", parameter),
            )[1]

        pipeline = Pipeline(
            config,
            denoiser={expert: read(expert) for expert in list_experts(config.boundary)} | {"text": {}},
            autoencoder=load_placed_autoencoder(folder / "vae", place),
            get_lora_modules=self.denoiser.get_lora_modules,
            parallel=options.parallel,
            offload=offload,
        )
        return add_preview_decoder(pipeline, folder)

    def check_weights(
        self, folder: Path, *, text: TextConfig, image_encoder: str | None, boundary: float | None
    ) -> None:
        """Check by the files' headers that all weights of a pipeline exist, are complete and fit its configs.

        Reading takes minutes, and the text encoder is read only at the first prompt, so without this check a missing or
        truncated shard would be noticed late.

        Raises:
          MissingError: If files are missing; the message names them.
          UserError: If a file is truncated, damaged or pickled, or tensors are missing, unexpected or of another shape.
        """
        for expert in list_experts(boundary):
            self.denoiser.check_weights(self.find_denoiser(folder, expert))
        check_autoencoder_weights(folder / "vae")
        if isinstance(text, FrozenTextConfig):
            check_text_encoder(text.folder)
        if image_encoder is not None:
            check_clip_weights(image_encoder, read_clip_vision_config(image_encoder))
            load_clip_image_processor(image_encoder)

    def find_denoiser(self, folder: Path, expert: str) -> Path:
        """Return the folder, or the authors' file, of one of a pipeline's experts: `backbone` or `low_noise`."""
        return folder / DENOISER_FOLDERS[expert]

    def make_dtype_fn(self, options: LoadOptions) -> Callable[[str], Any]:
        """Return a function from the path of a denoiser's parameter (`backbone/…`) to the dtype that it is read in."""
        kernels = tuple(f"{expert}/{path}" for expert in EXPERTS for path in self.denoiser.float32_kernels)
        return make_dtype_fn(np.float32, jnp.dtype(options.dtype), float32_kernels=kernels)

    def read_denoiser_config(self, folder: Path) -> BackboneConfig:
        """Return the config of a pipeline's denoiser, as the pipeline uses it."""
        return self.denoiser.read_folder_config(self.find_denoiser(folder, "backbone"))

    def read_parts(self, folder: Path) -> PipelineParts:
        """Read the configs of a pipeline's folder, from which its denoiser is fine-tuned.

        Raises:
          MissingError: If the folder lacks parts.
          UserError: If a setting is not supported, or the family's models cannot be fine-tuned here.
        """
        raise UserError(f"{folder} holds a model of the family {self.name}, which cannot be fine-tuned; use another")
