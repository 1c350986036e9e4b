"""Configuration of a model: all that training and sampling must agree on."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from dit_video.core.errors import UserError, check_at_least
from dit_video.diffusion import LearnedVariance, Prediction, Process, RectifiedFlow, Velocity
from dit_video.models.autoencoders import AutoencoderConfig, latent_grid
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.conditioning import FrameConditioning, check_conditioning
from dit_video.models.encoders import ByteEncoderConfig, ClassNamesConfig, TextConfig
from dit_video.tokens import (
    Canvas,
    CanvasShape,
    DenseShape,
    Grid,
    LayoutShape,
    PackedRows,
    PackedShape,
    compute_token_grid,
)

ValueT = TypeVar("ValueT", float, Float[np.ndarray, " n"])


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Configuration of a video diffusion model, the same in an experiment and in its pipeline.

    Raises:
      UserError: If parts do not fit together: channels, widths, numbers of classes or text tokens, names or records of
        conditioning, the layout, or a prediction that is not defined for the process.
    """

    autoencoder: AutoencoderConfig
    backbone: BackboneConfig
    text_encoder: TextConfig
    """Text encoder; a frozen one by its folder and identity, because its weights are not part of the model."""
    process: Process = field(default_factory=RectifiedFlow)
    """Path from data to noise, with the shift of its times."""
    prediction: Prediction = field(default_factory=Velocity)
    """Quantity that the backbone predicts."""
    layout: PackedShape | CanvasShape | None = None
    """Shape of the rows or canvases of a batch; None for a model that is only sampled, each clip in a row of its own
    size."""
    frame_conditioning: FrameConditioning | None = None
    """Conditioning on known pixels: by `cond_channels`, image embeddings or a time per token; None without it."""
    image_encoder: str | None = None
    """Folder of the frozen CLIP whose embeddings of a known first frame the backbone attends to (`image_width`), or of
    a pipeline that contains it; None without it."""
    fps: float | None = None
    """Frame rate of sampled clips, to which training clips of a higher rate are resampled. None keeps the rate of every
    training clip; a pipeline then has their median."""

    def __post_init__(self):
        self.prediction.check(self.process)
        self._check_text()
        self._check_parts()
        self._check_layout()

    def _check_parts(self) -> None:
        autoencoder, backbone = self.autoencoder, self.backbone
        check_at_least(1, **{"backbone.layers": backbone.layers, "backbone.patch": min(backbone.patch)})
        check_conditioning(backbone.conditioning)
        if autoencoder.channels > 3 * autoencoder.stride.volume:
            raise UserError(
                f"autoencoder.channels={autoencoder.channels} is invalid: a patch of {tuple(autoencoder.stride)} "
                f"pixels has only {3 * autoencoder.stride.volume} values. Use fewer channels or a larger stride."
            )
        for name, required, owner in (
            ("channels", autoencoder.channels, "autoencoder has channels"),
            ("context_width", self.text_encoder.width, "text encoder has width"),
        ):
            if (value := getattr(backbone, name)) != required:
                rule = f"the {owner}={required}. Use backbone.{name}={required}."
                raise UserError(f"backbone.{name}={value} is invalid: {rule}")
        if isinstance(self.prediction, LearnedVariance) != backbone.predicts_variance:
            raise UserError(
                "variance='predicted' of the backbone and prediction=LearnedVariance(...) need each other. Change one "
                "of the two."
            )
        if backbone.cond_channels and self.frame_conditioning is None:
            fix = "Use FrameConditioning(...) with the prob and rest of the training."
            raise UserError(f"frame_conditioning=None is invalid: the backbone reads conditioning latents. {fix}")

    def _check_text(self) -> None:
        text, backbone = self.text_encoder, self.backbone
        classes = text.classes if isinstance(text, ClassNamesConfig) else 0
        if classes != backbone.classes:
            raise UserError(
                f"captions are of {classes} classes, the backbone of {backbone.classes}; give the same number to "
                "text_encoder=ClassNamesConfig(classes=...) and backbone classes=..."
            )
        limits = [(backbone.max_text_tokens, "the backbone accepts captions of up to")]
        if self.layout is not None:
            limits.append((self.layout.text, "a row has space for"))
        for count, rule in limits:
            if count is not None and text.max_tokens > count:
                raise UserError(
                    f"text_encoder.max_tokens={text.max_tokens} is invalid: {rule} {count} text tokens. Use "
                    f"text_encoder.max_tokens={count} or less."
                )

    def _check_layout(self) -> None:
        layout, backbone = self.layout, self.backbone
        if layout is None:
            return
        if layout.segments < 1:
            raise UserError(f"layout.segments={layout.segments} is invalid: it must be at least 1. Use 1 or more.")
        if isinstance(self.text_encoder, ByteEncoderConfig) and (rest := layout.text % self.text_encoder.patch):
            raise UserError(
                f"layout.text={layout.text} is invalid: it is not divisible by the text encoder's patch of "
                f"{self.text_encoder.patch} bytes. Use layout.text={layout.text - rest}."
            )
        is_canvas = isinstance(layout, CanvasShape)
        if (Canvas if is_canvas else PackedRows) not in backbone.layouts:
            other = "rows. Use PackedShape(...)" if is_canvas else "canvases. Use CanvasShape(...)"
            raise UserError(f"layout={layout} is invalid: {type(backbone).__name__} takes {other}.")
        if isinstance(layout, CanvasShape):
            multiple, padding = tuple(backbone.size_multiple), tuple(backbone.canvas_padding)
            if any(side % unit for side, unit in zip(layout.cell, multiple, strict=True)):
                rule = f"it must be a multiple of the backbone's lowest resolution. Use {multiple}."
                raise UserError(f"layout.cell={tuple(layout.cell)} is invalid: {rule}")
            if any(side < reach for side, reach in zip(layout.padding, padding, strict=True)):
                rule = f"clips must lie as far apart as convolutions reach. Use {padding}."
                raise UserError(f"layout.padding={tuple(layout.padding)} is invalid: {rule}")

    @property
    def row_shape(self) -> LayoutShape:
        """Return the shape of sampled rows; a larger clip has a row of its own."""
        if self.layout is not None:
            return self.layout
        if PackedRows in self.backbone.layouts:
            return PackedShape(tokens=1, text=self.text_encoder.max_tokens, segments=1)
        return DenseShape(size=self.backbone.size_multiple, text=self.text_encoder.max_tokens)

    @property
    def size_multiple(self) -> Grid:
        """Return the multiple of a clip's height and width, in pixels, and of its frames after the first."""
        stride, multiple = self.autoencoder.stride, self.backbone.size_multiple
        return Grid(stride.t, stride.h * multiple.h, stride.w * multiple.w)

    def compute_token_dt(self, fps: ValueT) -> ValueT | float:
        """Return the spacing of tokens along time in positions, for clips of these frame rates: 1, or seconds."""
        if self.backbone.time_coordinate == "tokens":
            return 1.0
        return self.autoencoder.stride.t * self.backbone.patch.t / fps

    @property
    def token_lead(self) -> float:
        """Return the fraction of the spacing by which all tokens but a clip's first begin earlier."""
        return self.backbone.compute_token_lead(self.autoencoder.stride.t)

    def latent_grid(self, size: Grid) -> Grid:
        """Return the latent grid of a clip size.

        Raises:
          UserError: If the model cannot generate the size; the message names the nearest.
        """
        stride, multiple = self.autoencoder.stride, self.backbone.size_multiple
        for name, length, step, stride_, factor in (
            ("height", size.h, stride.h * multiple.h, stride.h, multiple.h),
            ("width", size.w, stride.w * multiple.w, stride.w, multiple.w),
        ):
            if length < 1 or length % step:
                below = max(step, length - length % step)
                raise UserError(
                    f"{name} {length} is not divisible by {step} (the autoencoder's stride {stride_} times the "
                    f"denoiser's {factor}); use {below} or {below + step}"
                )
        grid = latent_grid(size, stride)
        compute_token_grid(grid, self.backbone.patch)
        return grid

    def replace_backbone(self, **changes: Any) -> "ModelConfig":
        """Return the model with other fields of its backbone, such as its attention."""
        return dataclasses.replace(self, backbone=self.backbone.replace(**changes))
