"""VACE's pipelines, from diffusers' folders (`WanVACEPipeline`): Wan's pipelines with their own conditioner."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32

from dit_video.core.errors import UserError
from dit_video.core.resize import resize
from dit_video.families.family import PipelineParts, find_shape
from dit_video.families.vace.transformer import VaceDenoiserFormat
from dit_video.families.wan.pipeline import WanFamily
from dit_video.models.backbones.vace import VaceControl
from dit_video.models.conditioning import GREY
from dit_video.sampling.completion import check_options, encode_start
from dit_video.sampling.known_pixels import collect_known_pixels, fit_clip
from dit_video.sampling.plan import SamplingPlan
from dit_video.sampling.request import Conditioner, ModelParts, Request
from dit_video.tokens import Grid
from dit_video.video import Clip

_WHITE = 255


@dataclass(frozen=True, kw_only=True)
class VaceConditioner(Conditioner):
    """Clips with kept parts, control and reference images; without any of them, text to video."""

    accepted = (
        *("image", "last_image", "video", "generated", "conditions", "control", "reference_images"),
        *("strength", "method"),
    )

    def __call__(self, request: Request, model: ModelParts) -> SamplingPlan:
        """Return the plan of a request.

        Raises:
          UserError: If the model is not VACE's, a mask comes without a video or a video without a mask, a video or a
            control differs from the clip in length, a mask differs from the video in shape, or a frame has both an
            image and a video.
        """
        request.check_pictures(self.accepted)
        if request.method == "training_free":
            raise UserError("method='training_free' is invalid: VACE reads what is known. Use method='trained'")
        control = next((each for each in model.backbone.conditioning if isinstance(each, VaceControl)), None)
        if control is None:
            name = type(model.backbone).__name__
            raise UserError(
                f"conditioner=VaceConditioner() is invalid for a {name}, which reads no control. Use a model of VACE"
            )
        # A video that is changed as a whole, from its noisy latents on, is not read as control.
        is_changed = request.strength is not None and request.generated is None
        pixels, is_generated = compose_pixels(replace(request, video=None) if is_changed else request)
        check_options(request)
        inactive, reactive = (
            model.codec.encode_pixels(np.where(is_grey[..., None], np.float32(GREY), pixels))
            for is_grey in (is_generated, ~is_generated)
        )
        values = control.concatenate(inactive, reactive, is_generated)
        # The last image comes first, as in diffusers.
        references = [_encode_reference(image, request.grid, model) for image in reversed(request.reference_images)]
        nothing = np.zeros((1, *request.grid[1:]), bool)
        controls = [control.concatenate(each, np.zeros_like(each), nothing) for each in references]
        fields = {control.field: np.concatenate([*controls, values])}
        plan = SamplingPlan(fields, leading_frames=len(references), method="" if is_generated.all() else "trained")
        if (start := encode_start(request, model)) is None:
            return plan
        return plan._replace(start=np.concatenate([*references, start]), start_time=float(request.strength or 1.0))


def compose_pixels(request: Request) -> tuple[Float32[np.ndarray, "T H W 3"], Bool[np.ndarray, "T H W"]]:
    """Return pixels (0..255), with a request's control or grey where it keeps nothing, and True at these positions.

    Raises:
      UserError: If clips and masks do not fit the request or each other.
    """
    size = request.grid
    pixels, is_generated = np.full((*size, 3), GREY, np.float32), np.ones(size, bool)
    if request.control is not None:
        pixels[:] = fit_clip("control", request.control, size)
    if (request.video is None) != (request.generated is None):
        missing, fix = ("generated", "control=") if request.generated is None else ("video", "image=")
        raise UserError(f"{missing}=None is invalid: video and generated need each other. Give both, or use {fix}")
    if any(condition.strength < 1 for condition in request.conditions):
        raise UserError("strength= of a condition is invalid: VACE keeps what is known to the end. Use strength=1")
    if (known := collect_known_pixels(request)) is not None:
        pixels, is_generated = np.where(known.is_known[..., None], known.frames, pixels), ~known.is_known
    return pixels.astype(np.float32), is_generated


def _encode_reference(image: Clip, size: Grid, model: ModelParts) -> Float32[np.ndarray, "1 h w c"]:
    """Return the latent frame of an image that is scaled to fit into the frame, and centred on a white background.

    In its control all of it is inactive, and nothing is reactive or generated.
    """
    scale = min(size.h / image.height, size.w / image.width)
    height, width = (max(1, int(side * scale)) for side in (image.height, image.width))
    canvas = np.full((1, size.h, size.w, 3), _WHITE, np.uint8)
    top, left = (size.h - height) // 2, (size.w - width) // 2
    canvas[:, top : top + height, left : left + width] = resize(image.frames, height, width)
    return model.codec.encode_pixels(canvas)


class VaceFamily(WanFamily):
    """VACE (arXiv 2503.07598): Wan's text to video with control, masks and reference images, in diffusers' folders."""

    name = "vace"
    denoiser = VaceDenoiserFormat()
    pipeline_classes = ("WanVACEPipeline",)

    def recognize(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        query = find_shape(shapes, r"vace_blocks\.0\.(self_attn\.q|attn1\.to_q)\.weight")
        return None if query is None else f"Wan-AI/Wan2.1-VACE-{'14B' if query[0] == 5120 else '1.3B'}-diffusers"

    def read_parts(self, folder: Path, *, text_encoder: str | os.PathLike | None = None) -> PipelineParts:
        return super().read_parts(folder, text_encoder=text_encoder)._replace(conditioner=VaceConditioner())
