"""Config of a run's data."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dit_video.core.errors import UserError, check_at_least
from dit_video.data.clips import parse_background
from dit_video.data.latents.plan import Augmentations
from dit_video.data.sizes import SizeLimits
from dit_video.data.usable_clips import ClipRequirements
from dit_video.models.autoencoders import latent_grid
from dit_video.models.encoders import FrozenTextConfig
from dit_video.models.model_config import ModelConfig
from dit_video.tokens import CanvasShape, Grid, compute_token_grid


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Selection, sizes and augmentation of clips.

    Raises:
      UserError: If a value is out of range, or if clips that are not cached are to be augmented.
    """

    max_pixels: int
    """Maximum number of pixels of a frame; larger clips are resized, keeping their aspect ratio."""
    max_frames: int
    """Maximum number of frames, 1 + k * temporal stride."""
    held_out: tuple[str, ...] = ()
    """Names of clips that are not trained on, but reconstructed and reported; the split `validation` if empty."""
    where: str = ""
    """Condition on columns of the data set that training clips meet, such as `motion > 5 and sharpness > 60`."""
    captions: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Columns of captions and the share of each in training, such as {"long": 0.7, "short": 0.3}; if empty, the
    captions of the source."""
    background: str = "black"
    """Colour behind transparent pixels, such as white or #f2f2f2; `random` for another one for each clip and each part
    of it that is read, `file` for the one that a clip's file names."""
    max_excluded_share: float = 0.01
    """Maximum share of the training clips that are excluded because they cannot be used, such as those smaller than one
    multiple; with more of them it is an error."""
    weights: tuple[float, ...] = ()
    """Relative number of clips of each data set in an epoch; if empty, all clips have the same weight. A data set of
    weight 0 is not used."""
    clips_per_video: int = 1
    """Number of temporal crops of `max_frames`, spread over its length, that are taken from a longer clip."""
    resolutions: tuple[int, ...] = ()
    """Further, smaller limits on the pixels of a frame, at which each clip is trained on too."""
    flips: bool = False
    """True to train on each clip mirrored too; captions that mention left or right are then wrong."""
    cache_latents: bool = True
    """True to encode all clips once, before the denoiser is trained. False decodes and encodes them at every use, which
    needs no disk space and draws another temporal crop in every epoch. `clips_per_video`, `resolutions` and `flips`
    apply to the cache only."""
    workers: int = 0
    """Number of processes that read the denoiser's data; 0 for a thread."""

    def __post_init__(self):
        positive = {"clips_per_video": self.clips_per_video, "resolutions": min(self.resolutions, default=1)}
        check_at_least(1, **{f"data.{name}": value for name, value in positive.items()})
        check_at_least(0, workers=self.workers)
        parse_background(self.background)
        for name, share in self.captions.items():
            if not 0 < share < math.inf:
                raise UserError(
                    f"data.captions={dict(self.captions)} is invalid: the share of {name} is {share}, but must be a "
                    f"number above 0. Use a share such as 0.5, or leave {name} out."
                )
        weights = self.weights
        if not all(0 <= weight < math.inf for weight in weights) or (weights and not self.used_datasets):
            rule = "they must not be negative, and one must be positive."
            raise UserError(f"weights={weights} is invalid: {rule} Use 0 for a data set that is not used.")
        if not 0 <= (share := self.max_excluded_share) <= 1:
            raise UserError(f"max_excluded_share={share} is invalid: it must lie in [0, 1]. Use 0 to exclude none.")
        if (self.clips_per_video > 1 or self.resolutions or self.flips) and not self.cache_latents:
            options = "data.clips_per_video, data.resolutions and data.flips"
            raise UserError(f"{options} need cached latents. Leave them out, or set data.cache_latents=True.")

    @property
    def used_datasets(self) -> tuple[int, ...]:
        """Return the numbers of the data sets that are used; empty if all clips have the same weight."""
        return tuple(number for number, weight in enumerate(self.weights) if weight > 0)

    @property
    def used_weights(self) -> tuple[float, ...]:
        """Return the weights of the data sets that are used; empty if all clips have the same weight."""
        return tuple(self.weights[number] for number in self.used_datasets)

    def make_limits(self, model: ModelConfig) -> SizeLimits:
        """Return the limits on the sizes that clips are resized to for a model."""
        return SizeLimits(
            max_pixels=self.max_pixels, max_frames=self.max_frames, multiple=model.size_multiple, fps=model.fps
        )

    def count_max_clip_tokens(self, *, stride: Grid, patch: Grid) -> int:
        """Return the number of tokens of the largest clip, for an autoencoder's stride and a denoiser's patch."""
        side = Grid(1, stride.h * patch.h, stride.w * patch.w)
        return latent_grid(side._replace(t=self.max_frames), stride).t * (self.max_pixels // side.volume)

    def make_requirements(self, model: ModelConfig) -> ClipRequirements:
        """Return the requirements of a denoiser's training on its clips.

        Packed rows have room for every clip within the limits, and buckets crop clips. Embeddings of a frozen encoder
        are cut to the room for text.
        """
        text, shape = model.text_encoder, model.row_shape

        def has_room(size: Grid) -> bool:
            latents = latent_grid(size, model.autoencoder.stride)
            return shape.fits([compute_token_grid(latents, model.backbone.patch)], [0])

        augmentations = Augmentations(resolutions=self.resolutions if self.cache_latents else ())
        return ClipRequirements(
            limits=augmentations.list_limits(self.make_limits(model)),
            has_room=functools.cache(has_room) if isinstance(model.layout, CanvasShape) else None,
            tokenize=None if isinstance(text, FrozenTextConfig) else text.make_tokenizer(),
            max_text=shape.text,
        )
