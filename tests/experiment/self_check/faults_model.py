"""Silent faults of the denoiser: attention, conditioning, times, positions and layers."""

import sys

import jax
import jax.numpy as jnp
from experiment.self_check.faults_injection import Catalogue, replace_function, replace_method
from flax import nnx

from dit_video.models.backbones.blocks import Stream
from dit_video.models.backbones.denoise import make_text_record
from dit_video.models.backbones.dit import DiT
from dit_video.models.backbones.transformer import TimeEmbedding
from dit_video.models.conditioning import TextTokens, make_cond_latents
from dit_video.nn import AttentionInputs, scan_layers, sinusoidal_embedding
from dit_video.nn.attention.masks import dense_mask
from dit_video.tokens import compute_rotary_angles, rotate

FAULTS = Catalogue("model")
_dit = sys.modules["dit_video.models.backbones.dit"]


@FAULTS.add(
    "Self-attention does not see the borders of clips (cuDNN's path of AI-Hypercomputer/maxtext #4476).",
    "segment_isolation",
)
def attention_across_clips(run):
    def make(_):
        def self_attention(cls, segments, indices=None, **options):
            del options
            return cls(jnp.minimum(segments, 1), q_indices=indices)

        return classmethod(self_attention)

    replace_method(AttentionInputs, "self_attention", make)


@FAULTS.add(
    "Cross-attention does not see the borders of texts: a clip attends to the captions of its neighbours.",
    *("segment_isolation", "text_conditioning"),
)
def captions_across_clips(run):
    def make(_):
        return lambda self, segments: AttentionInputs(jnp.minimum(self.q_segments, 1), jnp.minimum(segments, 1))

    replace_method(AttentionInputs, "with_context", make)


@FAULTS.add(
    "The text never reaches the denoiser (a dropped condition: hao-ai-lab/FastVideo #1673).", "text_conditioning"
)
def text_dropped(run):
    original = make_text_record

    def make_empty(context, layout):
        record = original(context, layout)
        return record._replace(values=jnp.zeros_like(record.values)) if isinstance(record, TextTokens) else record

    replace_function(original, make_empty)


@FAULTS.add("The model time is rounded to bfloat16 before its sines.", *("time_conditioning", "precision"))
def time_in_bfloat16(run):
    def embed_rounded(values, width, **options):
        return sinusoidal_embedding(values.astype(jnp.bfloat16).astype(jnp.float32), width, **options)

    _dit.sinusoidal_embedding = embed_rounded


@FAULTS.add("The model gets times from 0 to 1, for an embedding that is made for 0 to 1000.", "time_conditioning")
def time_not_scaled(run):
    TimeEmbedding.model_time = lambda self, time: time


@FAULTS.add(
    "The model gets the time of a row's first clip for all of its clips (one timestep a pack: NVIDIA-NeMo/DFM).",
    *("time_conditioning", "segment_isolation"),
)
def time_of_first_clip(run):
    def make(embed_inputs):
        def embed_with_first(self, noisy, time, layout, conditioning):
            time = jnp.broadcast_to(time[:, :1], time.shape)
            return embed_inputs(self, noisy, time, layout, conditioning)

        return embed_with_first

    replace_method(DiT, "embed_inputs", make)


@FAULTS.add("Queries and keys are not rotated.", "positions")
def rotation_missing(run):
    replace_function(rotate, lambda x, angles: x)


@FAULTS.add("Queries are rotated, keys are not.", "positions")
def keys_not_rotated(run):
    def make(project):
        def project_wrongly(self, x, angles):
            q, _, v = project(self, x, angles)
            return q, project(self, x, None)[1], v

        return project_wrongly

    replace_method(Stream, "project_qkv", make)


@FAULTS.add("The rotary embedding takes columns for frames: the axes are in another order than its split.", "positions")
def rotary_axes_exchanged(run):
    original = compute_rotary_angles
    replace_function(original, lambda positions, rotary: original(positions[..., (2, 1, 0)], rotary))


@FAULTS.add("The positions that are added to the tokens are dropped.", *("positions", "trained_parameters"))
def position_embedding_dropped(run):
    def make(embed):
        def embed_without(self, noisy, layout, conditioning):
            position, self.position = self.position, lambda features: 0 * position(features)
            tokens = embed(self, noisy, layout, conditioning)
            self.position = position
            return tokens

        return embed_without

    replace_method(DiT, "embed_tokens", make)


@FAULTS.add("Self-attention is causal, as in the language model that it was copied from.", "token_mixing")
def attention_causal(run):
    original = dense_mask

    def mask_later(boxes):
        mask = original(boxes)
        return jnp.tril(mask) if mask.shape[-1] == mask.shape[-2] else mask

    replace_function(original, mask_later)


def _change_blocks(change):
    """Let the denoiser apply changed parameters of its stack of blocks."""
    original = scan_layers

    def scan_changed(x, groups, **options):
        graph, params = nnx.split(groups[0].stack)
        changed = groups[0]._replace(stack=nnx.merge(graph, jax.tree.map(change, params)))
        return original(x, [changed, *groups[1:]], **options)

    replace_function(original, scan_changed)


@FAULTS.add("The last block is never applied: a loop that ends one too early.", *("trained_parameters", "gradient"))
def layer_skipped(run):
    _change_blocks(lambda leaf: leaf[:-1])


@FAULTS.add("The first block gets no gradient: a `stop_gradient` was left in.", *("trained_parameters", "gradient"))
def layer_without_gradient(run):
    _change_blocks(lambda leaf: jnp.concatenate([jax.lax.stop_gradient(leaf[:1]), leaf[1:]]))


@FAULTS.add(
    "The blocks are not modulated by time and text, only by their tables.", *("time_conditioning", "trained_parameters")
)
def modulation_dropped(run):
    def make(compute):
        def compute_static(self, modulation):
            return compute(self, modulation._replace(values=jnp.zeros_like(modulation.values)))

        return compute_static

    replace_method(Stream, "compute_modulation", make)


@FAULTS.add(
    "The latents of the known frame never reach the denoiser (an image-to-video training that is not conditioned: "
    "Lightricks/LTX-Video-Trainer #48).",
    *("frame_conditioning", "trained_parameters"),
    variant="first frame",
)
def first_frames_ignored(run):
    original = make_cond_latents
    replace_function(original, lambda *arguments, **options: jnp.zeros_like(original(*arguments, **options)))


@FAULTS.add(
    "The conditioning latents are those of the whole clip, which the denoiser learns to copy.",
    "frame_conditioning",
    variant="first frame",
)
def all_frames_shown(run):
    original = make_cond_latents

    def show_all(latents, cond_mask, **options):
        return original(latents, cond_mask, **options | {"visible": jnp.ones_like(cond_mask)})

    replace_function(original, show_all)
