"""The interface of open model families: the files of their denoisers, and their pipelines."""

import abc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from jax.sharding import Mesh

from dit_video.autoencoders import AutoencoderConfig
from dit_video.backbones.protocol import BackboneConfig
from dit_video.conditioning import FrameConditioning
from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.core.offload import Offload
from dit_video.distributed import MeshConfig
from dit_video.families.denoiser_format import DenoiserFormat
from dit_video.generation.request import GenerationTask
from dit_video.pipelines.config import PipelineConfig
from dit_video.pipelines.pipeline import Pipeline
from dit_video.text import FrozenTextConfig
from dit_video.tokens import Grid
from dit_video.weights import LoadedScheduler
from dit_video.weights.parameter import Placement, place_on_device

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")
DEFAULT_DTYPE = DTYPES[0]
INDEX = "model_index.json"
"""File of a pipeline's folder that names its class and its parts."""


def read_pipeline_class(folder: Path) -> str | None:
    """Return the class that a pipeline's `model_index.json` names; None without that file, "None" without a class."""
    if not (folder / INDEX).is_file():
        return None
    index = read_json(folder / INDEX)
    return str(index.get("_class_name") if isinstance(index, dict) else None)


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of loading a pipeline of open weights; those of `dit_video.load`."""

    text_encoder: str | os.PathLike | None = None
    """Folder of the text encoder, if it is not the pipeline's own."""
    dtype: Dtype = DEFAULT_DTYPE
    """Dtype of the denoiser's matrix products and of their weights."""
    text_dtype: Dtype | None = None
    """Dtype of those of the text encoder; None for the denoiser's."""
    place: Placement = place_on_device
    """Function that places a parameter, given its path: `backbone/…`, `low_noise/…` of a second expert, or
    `autoencoder/…`."""
    mesh: MeshConfig | Mesh | None = None
    """Devices that sample together, to which `place` reads; None for one device."""
    offload: Offload | None = None
    """Weights in host memory, to which `place` reads; None for weights that stay on the devices."""


class PipelineParts(NamedTuple):
    """The configs in a pipeline's folder, with the family's settings that no file holds."""

    denoiser: BackboneConfig
    autoencoder: AutoencoderConfig
    text: FrozenTextConfig
    schedule: LoadedScheduler
    size: Grid
    """Frames, height and width of the clips that the model was trained on, at most."""
    fps: float
    """Frame rate of these clips."""
    guidance: float = 5.0
    """Scale of guidance that its authors sample with."""
    boundary: float | None = None
    """Boundary time of two experts: the one in `transformer` denoises from it on, the one in `transformer_2` below."""
    frame_conditioning: FrameConditioning | None = None
    """Conditioning on a first frame; None for a model without it."""
    image_encoder: str | None = None
    """Folder of the image encoder whose tokens the denoiser reads."""
    task: GenerationTask | None = None
    """Task that the model is used for; None for text to video, or image to video where there is an image."""


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

    @abc.abstractmethod
    def load_pipeline(self, folder: Path, options: LoadOptions) -> Pipeline:
        """Load the pipeline of a folder.

        Raises:
          MissingError: the folder lacks parts, all of which are named.
          UserError: unsupported settings, or weights that do not fit.
        """

    def make_config(self, folder: Path, options: LoadOptions) -> PipelineConfig:
        """Return the config of the pipeline that `load_pipeline` loads, without reading weights.

        Raises:
          MissingError: the folder lacks parts.
          UserError: unsupported settings, or a family whose pipelines cannot be planned here.
        """
        raise UserError(f"{folder} holds a model of the family {self.name}, which cannot be planned; use another")

    def read_parts(self, folder: Path) -> PipelineParts:
        """Read the configs of a pipeline's folder, from which its denoiser is fine-tuned.

        Raises:
          MissingError: the folder lacks parts.
          UserError: unsupported settings, or a family whose models cannot be fine-tuned here.
        """
        raise UserError(f"{folder} holds a model of the family {self.name}, which cannot be fine-tuned; use another")
