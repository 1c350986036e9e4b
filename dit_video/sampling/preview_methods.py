"""Quick previews as a part of a pipeline: its preview decoder, and the monitor of sampling that has it."""

import abc
import copy
from typing import Any, TypeVar

from dit_video.core.errors import UserError
from dit_video.sampling import Monitor
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.preview import PreviewDecoder
from dit_video.sampling.progress import Callback, make_monitor
from dit_video.video import Clip

PreviewT = TypeVar("PreviewT", bound="PreviewMethods")


class PreviewMethods(abc.ABC):
    """The part of a pipeline that shows clips while they are sampled."""

    config: PipelineConfig
    preview_decoder: PreviewDecoder | None = None
    """Decoder of quick previews; None if the pipeline's folder has none."""

    @abc.abstractmethod
    def decode(self, latents: Any, *, caption: str = "", seed: int = 0) -> Clip:
        """Decode normalised latents to a clip."""

    def with_preview_decoder(self: PreviewT, decoder: PreviewDecoder | None) -> PreviewT:
        """Return the same pipeline, with its weights, with another decoder of quick previews.

        Raises:
          UserError: a decoder for latents of another stride or number of channels.
        """
        model = self.config.autoencoder
        if decoder is not None and (decoder.stride, decoder.channels) != (model.stride, model.channels):
            raise UserError(
                f"a preview decoder for stride {list(decoder.stride)} and {decoder.channels} channels is invalid: the "
                f"autoencoder has {list(model.stride)} and {model.channels}. Use one that was fitted to it"
            )
        changed = copy.copy(self)
        changed.preview_decoder = decoder
        return changed

    def make_monitor(self, callback: Callback | None) -> Monitor | None:
        """Return the sampler's monitor that calls a callback with the progress; None without one."""
        return make_monitor(callback, self.decode, preview_decoder=self.preview_decoder, fps=self.config.fps)
