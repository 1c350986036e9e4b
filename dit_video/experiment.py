"""The config of a run: frozen, complete, and checked across its parts before anything is computed."""

from dataclasses import dataclass, field

from dit_video.autoencoder import PatchVaeConfig, latent_grid
from dit_video.data.sizes import SizeLimits
from dit_video.data.windows import WindowConfig
from dit_video.diffusion import FlowMatching
from dit_video.distributed import MeshConfig
from dit_video.dit import DitConfig
from dit_video.errors import UserError
from dit_video.evaluation.kinds import CaptionEvaluation, Evaluation
from dit_video.generation import Sampling
from dit_video.text import ByteEncoderConfig
from dit_video.tokens import Grid, RowShape
from dit_video.training.optimizer import OptimizerConfig, learning_rates


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which clips are used, at which sizes."""

    max_pixels: int
    """of a frame; a larger clip is resized, keeping its aspect ratio"""
    max_frames: int
    """1 + k * temporal stride"""
    fps: float | None = None
    """Clips of a higher rate are resampled to this one; None keeps every clip's own."""
    held_out: tuple[str, ...] = ()
    """file names of clips that are not trained on, but reconstructed and reported"""
    stretches: int = 1
    """how many stretches of `max_frames`, spread over its length, are taken of a longer clip"""


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining:
    """An autoencoder and how it is trained."""

    model: PatchVaeConfig
    windows: tuple[WindowConfig, ...]
    """shapes of the training batches; steps take them in turn"""
    optimizer: OptimizerConfig
    steps: int
    kl: float = 1e-4
    """weight of the latents' divergence from a standard normal, in nats a latent position"""
    ema_decay: float = 0.99


@dataclass(frozen=True, kw_only=True)
class DenoiserTraining:
    """A denoiser, its text encoder, and how they are trained together."""

    dit: DitConfig
    text: ByteEncoderConfig
    rows: RowShape
    batch: int
    """rows of a step"""
    optimizer: OptimizerConfig
    steps: int
    objective: FlowMatching = field(default_factory=FlowMatching)
    caption_dropout: float = 0.1
    ema_decay: float = 0.999


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A run, from clips to samples.

    Raises:
      UserError: parts that disagree.
    """

    name: str
    data: Data
    autoencoder: AutoencoderTraining
    denoiser: DenoiserTraining
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=CaptionEvaluation)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    log_every: int = 20
    save_every: int = 500

    def __post_init__(self):
        model, denoiser = self.autoencoder.model, self.denoiser
        if denoiser.dit.channels != model.channels:
            raise UserError(
                f"the denoiser takes {denoiser.dit.channels} channels, the autoencoder makes {model.channels}; "
                f"set dit channels={model.channels}"
            )
        if denoiser.dit.context_width != denoiser.text.width:
            raise UserError(
                f"the denoiser takes context of width {denoiser.dit.context_width}, the text encoder makes "
                f"{denoiser.text.width}; set dit context_width={denoiser.text.width}"
            )
        for training in (self.autoencoder, denoiser):
            learning_rates(training.optimizer, steps=training.steps)
        if not 0 <= denoiser.caption_dropout <= 1:
            raise UserError(f"caption_dropout {denoiser.caption_dropout} must lie in [0, 1]")
        if denoiser.text.max_tokens > denoiser.rows.text:
            raise UserError(
                f"a caption may have {denoiser.text.max_tokens} tokens, a row has room for {denoiser.rows.text}; "
                f"set text max_tokens={denoiser.rows.text} or less"
            )
        if not self.autoencoder.windows:
            raise UserError("the autoencoder needs at least one window shape to train on")
        if denoiser.dit.patch.t != 1:
            raise UserError(
                f"a patch of {denoiser.dit.patch.t} latent frames divides no clip, as its first latent frame stands "
                "alone; use 1 along time"
            )
        for name, size in [("max_frames", Grid(self.data.max_frames, *self._multiple[1:]))] + [
            ("window", window.size) for window in self.autoencoder.windows
        ]:
            try:
                latent_grid(size, model.stride)
            except UserError as error:
                raise UserError(f"{name} does not fit the autoencoder: {error}") from error
        largest = self._largest_clip()
        if largest > denoiser.rows.tokens:
            raise UserError(
                f"a clip of {self.data.max_pixels} pixels and {self.data.max_frames} frames is up to {largest} tokens, "
                f"a row has room for {denoiser.rows.tokens}; set rows tokens={largest} or lower max_pixels"
            )

    @property
    def _multiple(self) -> Grid:
        stride, patch = self.autoencoder.model.stride, self.denoiser.dit.patch
        return Grid(stride.t, stride.h * patch.h, stride.w * patch.w)

    def _largest_clip(self) -> int:
        """Tokens of the largest clip that the limits let through."""
        multiple = self._multiple
        latents = latent_grid(Grid(self.data.max_frames, *multiple[1:]), self.autoencoder.model.stride)
        return latents.t * (self.data.max_pixels // (multiple.h * multiple.w))

    @property
    def limits(self) -> SizeLimits:
        """Which sizes clips are brought to."""
        return SizeLimits(
            max_pixels=self.data.max_pixels, max_frames=self.data.max_frames, multiple=self._multiple, fps=self.data.fps
        )
