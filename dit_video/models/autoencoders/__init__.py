"""Autoencoders of clips: models, losses, quantisation, streaming, tiling and packing on canvases."""

from dit_video.models.autoencoders.adversarial import R1, AdversarialConfig, LeCam
from dit_video.models.autoencoders.canvas import (
    ClipCanvas,
    compute_padding_share,
    compute_segment_ids,
    merge_sizes,
    pack_canvases,
)
from dit_video.models.autoencoders.codebook import CodebookConfig, CodebookLearning, CodebookLoss
from dit_video.models.autoencoders.config import AutoencoderConfig, IdentityConfig, LoadParams
from dit_video.models.autoencoders.image_vae import ImageLevels, ImageVaeConfig
from dit_video.models.autoencoders.inflate import InflatedConfig, inflate
from dit_video.models.autoencoders.interface import Autoencoder, Normalizer, Posterior, Vae, latent_grid
from dit_video.models.autoencoders.latent_loss import DecodedClips, KlLoss, LatentLoss, LearnedArrays
from dit_video.models.autoencoders.ltx_vae import LtxVaeConfig
from dit_video.models.autoencoders.objective import AutoencoderObjective
from dit_video.models.autoencoders.patch_vae import PatchVae, PatchVaeConfig, make_linear_path
from dit_video.models.autoencoders.patches import (
    ClipStatistics,
    LinearAutoencoder,
    fit_linear,
    from_patches,
    to_patches,
)
from dit_video.models.autoencoders.streaming import Tiles, decode_stream, encode_stream, measure_tiling_error
from dit_video.models.autoencoders.vae import CausalVaeConfig
from dit_video.models.autoencoders.vq import VqConfig
