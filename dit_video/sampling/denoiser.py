"""A trained denoiser in use: its models, parameters and texts."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from flax import nnx
from jax.sharding import Mesh

from dit_video.core.offload import move_to_devices
from dit_video.diffusion import Prediction, Process
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.encoders import BatchTokenizer, CaptionTokens, Tokenizer
from dit_video.tokens import Grid

EXPERTS = ("backbone", "low_noise")
"""Names of the parameters of two experts, the one for noisy times first; a single denoiser has the first name."""


def list_experts(boundary: float | None) -> tuple[str, ...]:
    """Return the names of a model's experts: two with a boundary time between them, or one."""
    return EXPERTS[:1] if boundary is None else EXPERTS


class Denoiser(NamedTuple):
    """A trained denoiser with everything that sampling needs."""

    backbone: nnx.GraphDef
    text: nnx.GraphDef
    params: dict[str, Any]
    """`{"backbone": ..., "text": ...}`, and with two experts also `"low_noise"`, with the structure of `"backbone"`."""
    tokenizer: Tokenizer | BatchTokenizer
    process: Process
    patch: Grid
    prediction: Prediction
    token_dt: float
    """Distance of consecutive tokens along time, in units of positions."""
    token_lead: float
    """Fraction of that distance by which all tokens but a clip's first begin earlier."""
    boundary: float | None = None
    """Time below which the second of two experts, `low_noise`, denoises."""
    mesh: Mesh | None = None
    """Devices that sample together, for which `backbone` is made, with `params` on them; None for one device."""
    streams_layers: bool = False
    """True moves layers in host memory to the devices one at a time."""

    @property
    def experts(self) -> tuple[str, ...]:
        """Return the names of the experts' parameters, the one for noisy times first."""
        return list_experts(self.boundary)

    @property
    def config(self) -> BackboneConfig:
        """Return the config of the backbone."""
        return nnx.merge(self.backbone, self.params["backbone"]).config

    @contextlib.contextmanager
    def open_params(self, expert: str) -> Iterator[dict[str, Any]]:
        """Move the parameters of one expert and of the text encoder to the devices while a `with` block runs."""
        params = {"backbone": self.params[expert], "text": self.params["text"]}
        with move_to_devices(params, streams_layers=self.streams_layers) as moved:
            yield moved

    def embed(self, prompts: Collection[str]) -> dict[str, CaptionTokens]:
        """Return the tokens of each prompt; a frozen encoder embeds all of them together."""
        if isinstance(self.tokenizer, BatchTokenizer):
            return dict(zip(prompts, self.tokenizer.encode_many(list(prompts)), strict=True))
        return {prompt: self.tokenizer(prompt) for prompt in prompts}
