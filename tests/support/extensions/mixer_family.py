"""A model family with a backbone of its own, as a file of another package."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from dit_video.core.registry import register
from dit_video.families import DenoiserFormat, Family, register_family
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.conditioning import TextTokens
from dit_video.nn import ONE_DEVICE, Linear
from dit_video.sampling.loading import load_pipeline
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import read_pipeline_config
from dit_video.tokens import segment_mean
from dit_video.weights.lora import LoraModule
from dit_video.weights.streaming import FileMap
from dit_video.weights.tensor_map import TensorMapping


@register
@dataclass(frozen=True, kw_only=True)
class MixerConfig(BackboneConfig):
    channels: int
    context_width: int
    width: int = 16
    layers: int = 1

    def make(self, rngs, parallel=ONE_DEVICE):
        return Mixer(self, parallel, rngs)


class Mixer(nnx.Module):
    """Tokens that know of the others only their mean, the text and the time."""

    def __init__(self, config, parallel, rngs):
        self.config = config
        self.tokens = Linear(config.token_width, config.width, parallel=parallel, rngs=rngs)
        self.clip = Linear(config.width + config.context_width + 1, config.width, parallel=parallel, rngs=rngs)
        self.head = Linear(config.width, config.token_width, parallel=parallel, rngs=rngs)

    def __call__(self, noisy, time, layout, conditioning, state=None):
        conditioning.check(self.config.conditioning_kinds)
        x, text = self.tokens(noisy), conditioning[TextTokens]
        words = segment_mean(text.values, text.segments, count=layout.count)
        clip = self.clip(jnp.concatenate([layout.mean(x), words, time[..., None]], axis=-1))
        return self.head(nnx.silu(x + layout.expand(clip))), state


class MixerFormat(DenoiserFormat[MixerConfig]):
    config_class, layouts = MixerConfig, {"TheirMixer": "diffusers"}
    names: ClassVar = {"tokens": "proj_in", "clip": "clip_embedder", "head": "proj_out"}

    def read_config(self, folder, document):
        return MixerConfig(channels=document["in_channels"], context_width=document["text_dim"], width=document["dim"])

    def make_document(self, config, layout):
        sizes = {"in_channels": config.channels, "text_dim": config.context_width, "dim": config.width}
        return {"_class_name": "TheirMixer", **sizes}

    def make_file_map(self, config, layout):
        kernels = {f"{ours}/kernel": TensorMapping(f"{name}.weight", "o i -> i o") for ours, name in self.names.items()}
        biases = {f"{ours}/bias": TensorMapping(f"{name}.bias") for ours, name in self.names.items()}
        return FileMap.from_tensor_map(kernels | biases)

    def get_lora_modules(self, config, *, primary_layout="diffusers"):
        return {name: LoraModule(f"{ours}/kernel") for ours, name in self.names.items()}


class MixerFamily(Family):
    name, denoiser = "mixer", MixerFormat()
    parts, pipeline_classes = ("transformer", "rest"), ("TheirPipeline",)

    def make_config(self, folder, options):
        backbone = self.denoiser.read_folder_config(folder / "transformer")
        config = read_pipeline_config(folder / "rest")
        return replace(config, model=replace(config.model, backbone=backbone))

    def load_pipeline(self, folder, options):
        rest = load_pipeline(folder / "rest")
        _, params = self.denoiser.load(folder / "transformer")
        parameters = {"autoencoder": rest.codec.params, "denoiser": rest.denoiser_params | {"backbone": params}}
        config = self.make_config(folder, options)
        return Pipeline(config, **parameters, get_lora_modules=self.denoiser.get_lora_modules, mesh=options.mesh)


register_family(MixerFamily())
