"""Autoencoders of clips: models, losses, quantisation, streaming, tiling and packing on canvases."""

from dit_video.models.autoencoders.adversarial import R1, AdversarialConfig, LeCam
from dit_video.models.autoencoders.canvas import (
    ClipCanvas,
    compute_padding_share,
    compute_segment_ids,
    merge_sizes,
    pack_canvases,
)
from dit_video.models.autoencoders.image_vae import ImageLevels, ImageVaeConfig
from dit_video.models.autoencoders.inflate import InflatedConfig, inflate
from dit_video.models.autoencoders.interface import (
    Autoencoder,
    AutoencoderConfig,
    IdentityConfig,
    NoisyAutoencoderConfig,
    SymmetricAutoencoderConfig,
    latent_grid,
)
from dit_video.models.autoencoders.ltx_vae import LtxVaeConfig
from dit_video.models.autoencoders.objective import AutoencoderObjective
from dit_video.models.autoencoders.patch_vae import LinearAutoencoder, PatchVaeConfig, fit_linear, init_from_linear
from dit_video.models.autoencoders.streaming import Tiles, decode_stream, encode_stream, measure_tiling_error
from dit_video.models.autoencoders.vae import CausalVaeConfig
from dit_video.models.autoencoders.vq import CodebookConfig, VqConfig
