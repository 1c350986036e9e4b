"""A model family with a backbone of its own, as a file of another package."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from dit_video.core.registry import register
from dit_video.families import DenoiserFormat, Family, register_family
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.conditioning import TextTokens
from dit_video.nn import ONE_DEVICE, Linear
from dit_video.sampling.loading import load_pipeline
from dit_video.sampling.pipeline_config import read_pipeline_config
from dit_video.weights.folders import map_linear
from dit_video.weights.lora import LoraModule
from dit_video.weights.streaming import FileMap


@register
@dataclass(frozen=True, kw_only=True)
class MixerConfig(BackboneConfig):
    channels: int
    context_width: int
    width: int = 16
    layers: int = 1

    def make(self, rngs, partitioner=ONE_DEVICE):
        return Mixer(self, partitioner, rngs)


class Mixer(nnx.Module):
    """Tokens that know of the others only their mean, the text and the time."""

    def __init__(self, config, partitioner, rngs):
        self.config = config
        self.tokens = Linear(config.token_width, config.width, partitioner=partitioner, rngs=rngs)
        self.clip = Linear(config.width + config.context_width + 1, config.width, partitioner=partitioner, rngs=rngs)
        self.head = Linear(config.width, config.token_width, partitioner=partitioner, rngs=rngs)

    def __call__(self, noisy, time, layout, conditioning, state=None):
        conditioning.check(self.config.conditioning_kinds)
        x, text = self.tokens(noisy), conditioning[TextTokens].mean(layout.count)
        clip = self.clip(jnp.concatenate([layout.mean(x), text, time[..., None]], axis=-1))
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
        return FileMap.from_tensor_map(map_linear(self.names))

    def get_lora_modules(self, config, *, primary_layout="diffusers"):
        return {name: LoraModule(f"{ours}/kernel") for ours, name in self.names.items()}


class MixerFamily(Family):
    name, denoiser = "mixer", MixerFormat()
    parts, pipeline_classes = ("transformer", "rest"), ("TheirPipeline",)

    def make_config(self, folder, options):
        backbone = self.denoiser.read_folder_config(folder / "transformer")
        return read_pipeline_config(folder / "rest").replace_model(backbone=backbone)

    def load_pipeline(self, folder, options):
        lora_modules = self.denoiser.get_lora_modules
        rest = load_pipeline(folder / "rest", get_lora_modules=lora_modules, parallel=options.parallel)
        _, params = self.denoiser.load(folder / "transformer")
        return rest.replace(config=self.make_config(folder, options), denoiser={"backbone": params})


register_family(MixerFamily())
