"""The truth of a rendered scene, with which metrics of generation tasks compare a sample."""

from typing import NamedTuple

from dit_video.models.conditioning import KnownMask
from dit_video.scenes import Scene
from dit_video.video import Clip


class TaskTruth(NamedTuple):
    """The truth of a sample: the element of `MetricBatch.scenes`."""

    scene: Scene
    """The scene that the result is to show."""
    reference: Clip
    """Its rendering, of the sample's size."""
    reconstruction: Clip
    """The autoencoder's reconstruction of the rendering: the best that a sample can be."""
    is_known: KnownMask | None = None
    """Pixels that the model got; None for none."""
    frame: int = -1
    """Number of the new frame at which positions are compared."""
    source: Scene | None = None
    """The scene that the clip showed before it was changed."""
