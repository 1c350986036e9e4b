"""Named protocols: the ones for published figures, and the ones that other modules register."""

from collections.abc import Mapping, Sequence
from dataclasses import fields as list_fields
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.evaluation.feature_functions import (
    C3dLogits,
    ClipEmbeddings,
    FeatureFunction,
    I3dFeatures,
    InceptionFeatures,
    VideoMaeFeatures,
)
from dit_video.evaluation.measure import WEIGHT_FIELDS
from dit_video.evaluation.metrics.captions import ClipSimilarity, TextRetrieval
from dit_video.evaluation.metrics.distributions import (
    FrechetMetric,
    InceptionScore,
    KernelMetric,
    Memorisation,
    PrecisionRecall,
)
from dit_video.evaluation.metrics.frames import (
    Colourfulness,
    DynamicDegree,
    MotionSmoothness,
    Sharpness,
    SubjectConsistency,
    TemporalFlickering,
)
from dit_video.evaluation.metrics.likelihood import BitsPerDimension, LossByTime
from dit_video.evaluation.metrics.metric import Metric
from dit_video.evaluation.metrics.reconstruction import (
    MultiscaleSsim,
    PerceptualDistance,
    Psnr,
    ReconstructionFlicker,
    Ssim,
)
from dit_video.evaluation.protocol import ClipSampling, EvaluationProtocol, ReconstructionProtocol
from dit_video.evaluation.vbench import VBENCH_METRICS

FRAME_METRICS: tuple[Metric, ...] = (
    TemporalFlickering(),
    MotionSmoothness(),
    DynamicDegree(),
    Sharpness(),
    Colourfulness(),
)
"""Metrics of samples that need neither weights nor data clips."""
_FVD = FrechetMetric(features=I3dFeatures(), name="fvd", label="FVD")
_FVD_VIDEO_MAE = FrechetMetric(features=VideoMaeFeatures(), name="fvd_video_mae", label="FVD (VideoMAE)")
_FID = FrechetMetric(features=InceptionFeatures(), name="fid", label="FID of frames")

PROTOCOLS: dict[str, EvaluationProtocol] = {
    # StyleGAN-V (arXiv 2112.14683, appendix): 2,048 clips of 16 frames at random positions, 256 pixels. Inception score
    # as TGAN v2 (arXiv 1811.09245): 2,048 clips in one part, ten times with other samples, here in ten parts.
    "ucf101": EvaluationProtocol(
        name="ucf101",
        clips=ClipSampling(frames=16, start="random", size=(256, 256), filter="bilinear"),
        count=2048,
        real_count=2048,
        split="train",
        metrics=(
            _FVD,
            _FVD_VIDEO_MAE,
            InceptionScore(logits=C3dLogits(), name="video_inception_score", label="Inception score of videos"),
            PrecisionRecall(features=I3dFeatures()),
            Memorisation(features=I3dFeatures()),
        ),
    ),
    # One sample for the first caption of each of the 2,990 test videos, as Make-A-Video (arXiv 2209.14792, section 4.1)
    # with one caption instead of 20.
    "msrvtt": EvaluationProtocol(
        name="msrvtt",
        clips=ClipSampling(frames=16, fps=8.0, start="middle", size=(256, 256)),
        count=2990,
        split="test",
        metrics=(_FVD, _FID, KernelMetric(features=InceptionFeatures()), ClipSimilarity(), TextRetrieval()),
    ),
    "reconstruction": ReconstructionProtocol(
        name="reconstruction",
        clips=ClipSampling(frames=17),
        metrics=(
            Psnr(),
            Ssim(),
            MultiscaleSsim(),
            PerceptualDistance(weights="weights/lpips.safetensors"),
            ReconstructionFlicker(),
            FrechetMetric(features=I3dFeatures(), name="rfvd", label="rFVD"),
        ),
    ),
    # The model itself is measured on data clips: nothing is sampled.
    "likelihood": EvaluationProtocol(
        name="likelihood",
        clips=ClipSampling(frames=17),
        real_count=256,
        metrics=(LossByTime(), BitsPerDimension()),
    ),
    "samples": EvaluationProtocol(
        name="samples",
        metrics=(
            *FRAME_METRICS,
            SubjectConsistency(features=ClipEmbeddings()),
            *VBENCH_METRICS,
            ClipSimilarity(),
            TextRetrieval(),
            _FVD,
            _FVD_VIDEO_MAE,
            _FID,
        ),
    ),
}
"""Protocols by name."""


def register_protocol(protocol: EvaluationProtocol) -> None:
    """Add a protocol by its name; scripts find it if they import the module that calls this."""
    PROTOCOLS[protocol.name] = protocol


def get_protocol(
    name: str,
    *,
    metrics: Sequence[str] = (),
    weights: Path | None = None,
    count: int | None = None,
    fields: Mapping[str, Any] = MappingProxyType({}),
) -> EvaluationProtocol:
    """Return a named protocol.

    Args:
      name: Its name.
      metrics: Names of values; only the metrics that compute one of them are kept.
      weights: Folder of the weight files, instead of `weights/`.
      count: Number of samples instead of the protocol's own, or number of data clips if nothing is sampled; figures
        with different numbers are not comparable.
      fields: JSON values of other fields of the protocol, by name.

    Raises:
      UserError: If the name is unknown, the protocol lacks a metric or a field, or a value is not of the field's type.
    """
    if name not in PROTOCOLS:
        raise UserError(f"protocol={name!r} is invalid: there is no such protocol. Use one of {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if fields:
        protocol = config_json.from_json(config_json.to_json(protocol) | fields)
    if metrics:
        known = {value: metric for metric in protocol.metrics for value in metric.describe()}
        if unknown := [each for each in metrics if each not in known]:
            rule = f"the protocol {name} computes no such value"
            raise UserError(f"metrics={unknown[0]!r} is invalid: {rule}. Use some of {', '.join(known)}")
        kept = [known[each] for each in metrics]
        protocol = replace(protocol, metrics=tuple(metric for metric in protocol.metrics if metric in kept))
    if count is not None:
        has_samples = any({*metric.needs} - {"real_clips", "pipeline"} for metric in protocol.metrics)
        protocol = replace(protocol, count=count) if has_samples else replace(protocol, real_count=count)
    if weights is not None:
        protocol = replace(protocol, metrics=tuple(_move_weights(metric, weights) for metric in protocol.metrics))
    return protocol


def _move_weights(config: Any, folder: Path) -> Any:
    """Return a metric or a feature function whose weight files are in a folder."""
    values: dict[str, Any] = {}
    for each in list_fields(config):
        value = getattr(config, each.name)
        if isinstance(value, FeatureFunction):
            values[each.name] = _move_weights(value, folder)
        elif each.name in WEIGHT_FIELDS and isinstance(value, str) and value:
            values[each.name] = str(folder / Path(value).name)
    return replace(config, **values)
