"""The task mix of a training: the mask of known pixels that every example has at a step."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dit_video.core.rng import make_generator
from dit_video.models.conditioning import FrameConditioning, IsKnown, make_mask_fields
from dit_video.tokens import Field, Grid


class MaskMix(NamedTuple):
    """Draws of masks, each a function of the seed and the running number of the example in the data plan."""

    conditioning: FrameConditioning
    seed: int
    channels: int
    """Channels of the latents."""
    stride: Grid
    """Pixels of a latent along (t, h, w)."""

    @property
    def fields(self) -> tuple[Field, Field]:
        """Return the fields of the drawn mask: latents of the clip with unknown pixels grey, and its shares."""
        return make_mask_fields(channels=self.channels, temporal_stride=self.stride.t)

    def list_cached_fields(self) -> list[tuple[Field, Field]]:
        """Return the fields of every kind of mask, as examples are cached."""
        options = {"channels": self.channels, "temporal_stride": self.stride.t}
        return [make_mask_fields(**options, kind=kind) for kind in range(len(self.conditioning.masks))]

    def select(self, fields: Mapping[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
        """Return the fields of an example with the drawn mask in place of all cached kinds; zero if nothing is known.

        Args:
          fields: Its fields by name.
          rank: Running number of the example in the plan.
        """
        cached = [tuple(fields[field.name] for field in pair) for pair in self.list_cached_fields()]
        names = {field.name for pair in self.list_cached_fields() for field in pair}
        selected = {name: values for name, values in fields.items() if name not in names}
        kind = self.conditioning.draw_kind(self.seed, rank)
        drawn = tuple(map(np.zeros_like, cached[0])) if kind is None else cached[kind]
        return selected | {field.name: values for field, values in zip(self.fields, drawn, strict=True)}

    def draw_known(self, size: Grid, rank: int) -> IsKnown:
        """Return the known pixels of an example of this size, for clips that are encoded as they are read."""
        kind = self.conditioning.draw_kind(self.seed, rank)
        generated = None
        if kind is not None:
            generated = self.conditioning.masks[kind].draw(make_generator(self.seed, "mask", rank), size)
        return np.zeros(size, bool) if generated is None else ~generated
