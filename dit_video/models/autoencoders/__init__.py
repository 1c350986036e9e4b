"""Autoencoders of clips: models, losses, quantisation, streaming, tiling and packing on canvases."""

from dit_video.models.autoencoders.adversarial import R1, AdversarialConfig, LeCam
from dit_video.models.autoencoders.canvas import (
    ClipCanvas,
    compute_padding_share,
    compute_segment_ids,
    merge_sizes,
    pack_canvases,
)
from dit_video.models.autoencoders.identity import IdentityConfig
from dit_video.models.autoencoders.image_blocks import ImageLevels
from dit_video.models.autoencoders.image_vae import ImageVaeConfig
from dit_video.models.autoencoders.inflate import InflatedConfig, inflate
from dit_video.models.autoencoders.interface import (
    Autoencoder,
    AutoencoderConfig,
    NoisyAutoencoderConfig,
    SymmetricAutoencoderConfig,
    latent_grid,
)
from dit_video.models.autoencoders.linear import LinearAutoencoder, fit_linear
from dit_video.models.autoencoders.ltx_vae import LtxVaeConfig
from dit_video.models.autoencoders.objective import AutoencoderObjective
from dit_video.models.autoencoders.patch_vae import PatchVaeConfig, init_from_linear
from dit_video.models.autoencoders.quantizer import CodebookConfig
from dit_video.models.autoencoders.streaming import decode_stream, encode_stream, measure_tiling_error
from dit_video.models.autoencoders.tiling import Tiles
from dit_video.models.autoencoders.vae import CausalVaeConfig
from dit_video.models.autoencoders.vq import VqConfig
