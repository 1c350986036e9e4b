"""A trained model, whole: prompts in, clips out.

A pipeline folder holds `pipeline.json` (the configs), `autoencoder.safetensors` and `denoiser.safetensors`: no pickle,
and nothing of the training state.
"""

import copy
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, cast, overload

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from dit_video.autoencoders import AutoencoderConfig
from dit_video.backbones.wan import WanDitConfig
from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.files import atomic_path, read_document, write_json
from dit_video.core.trees import flatten
from dit_video.core.trees import size as count
from dit_video.diffusion import Guidance
from dit_video.diffusion import sampler as sampler_of
from dit_video.encoders.autoencoder import Codec
from dit_video.encoders.text import moved, open_tokenizer
from dit_video.families.wan.transformer import wan_modules
from dit_video.generation import (
    Denoiser,
    LatentRequest,
    LatentTrace,
    Sampling,
    initial_noise,
    sample_latents,
    trace_latents,
)
from dit_video.generation.tasks.image_to_video import Images
from dit_video.nn import graph_of, merge_lora, param_shapes
from dit_video.pipelines.config import Image, PipelineConfig, Request, as_grid
from dit_video.video import Clip
from dit_video.weights import load as load_weights
from dit_video.weights import load_lora, own_modules
from dit_video.weights import save as save_weights

FORMAT = 1
CONFIG = "pipeline.json"
_AUTOENCODER, _DENOISER = "autoencoder.safetensors", "denoiser.safetensors"
_BATCH = 8
"""Clips that the autoencoder takes at once."""
_DTYPES = ("float32", "bfloat16")
Scale = float | int | tuple[float, float] | Guidance
Expert = Literal["dit", "low_noise"]


class Pipeline:
    """Prompts to clips, clips to latents and back."""

    def __init__(self, config: PipelineConfig, *, autoencoder: dict[str, Any], denoiser: dict[str, Any]):
        """`autoencoder` and `denoiser` are parameters: nested dictionaries of arrays."""
        self.config = config
        self.codec = Codec(config.autoencoder, autoencoder)
        """the autoencoder"""
        self._images = Images(config, self.codec)
        self._denoiser = Denoiser(
            dit=graph_of(config.dit.make),
            text=graph_of(config.text.make),
            params=denoiser,
            tokenizer=open_tokenizer(config.text),
            process=config.process,
            prediction=config.prediction,
            patch=config.dit.patch,
            boundary=config.boundary,
            interval=config.interval,
        )

    @overload
    def generate(
        self,
        prompt: str | int,
        *,
        size: tuple[int, int, int] | None = ...,
        steps: int | None = ...,
        guidance: Scale | None = ...,
        negative: str = ...,
        seed: int = ...,
        sampler: str | None = ...,
        noise: Float32[np.ndarray, "t h w c"] | None = ...,
        image: Image | None = ...,
        last_image: Image | None = ...,
        output: Literal["clip"] = ...,
    ) -> Clip: ...

    @overload
    def generate(
        self,
        prompt: str | int,
        *,
        size: tuple[int, int, int] | None = ...,
        steps: int | None = ...,
        guidance: Scale | None = ...,
        negative: str = ...,
        seed: int = ...,
        sampler: str | None = ...,
        noise: Float32[np.ndarray, "t h w c"] | None = ...,
        image: Image | None = ...,
        last_image: Image | None = ...,
        output: Literal["latents"],
    ) -> Float32[np.ndarray, "t h w c"]: ...

    def generate(
        self,
        prompt,
        *,
        size=None,
        steps=None,
        guidance=None,
        negative="",
        seed=0,
        sampler=None,
        noise=None,
        image=None,
        last_image=None,
        output="clip",
    ):
        """One clip from a prompt.

        Args:
          prompt: what it is to show; the empty prompt samples without condition. Of a model of classes it is a class,
            by its name or its number.
          size: frames, height and width in pixels; the training size by default. Frames are 1 + k * temporal stride.
          steps: of the sampler; more is slower and closer to the exact flow.
          guidance: how strongly the prompt is followed at the cost of variety; 1 is none. Two numbers are for the two
            experts of a model that has them, that of the noisy times first. `Guidance` has an interval of times,
            rescaling, projection and a scale of the image besides.
          negative: what guidance leads away from, instead of from no prompt (or class) at all.
          seed: the same seed, size and model give the same clip.
          sampler: its name, of `dit_video.diffusion.SAMPLERS`. Noise that it draws on the way is the seed's.
          noise: the starting point instead of the seed's, standard normal `[t h w c]` of the latents' size.
          image: what the clip begins with, a clip of one frame or pixels `[H W 3]` of its size, in models that take one
            (Wan's I2V, which need it, and TI2V).
          last_image: what it ends with, in those that take that too.
          output: `clip`, or `latents` for normalised latents `[t h w c]`.

        Raises:
          UserError: a size that the model cannot make (it names the nearest), no such class, an unknown sampler, less
            than one step, a seed that is no whole number below 2**32, noise of another shape, images that do not fit
            size or model, or a model whose values become NaN or infinite.
        """
        if output not in ("clip", "latents"):
            raise UserError(f"unknown output {output!r}; use clip or latents")
        size = self.config.size if size is None else as_grid(size)
        request = Request(str(prompt), size, seed, negative, image, last_image)
        drawn = self.sampling(steps=steps, guidance=guidance, sampler=sampler)
        asked = self._latent_requests([request], noise=noise)
        latents = sample_latents(self._denoiser, asked, **self._how(drawn, 1))
        return latents[0] if output == "latents" else self._clips(latents, [request])[0]

    def trace(
        self,
        request: Request,
        *,
        steps: int | None = None,
        guidance: Scale | None = None,
        sampler: str | None = None,
    ) -> LatentTrace:
        """What sampling goes through: the latents after every step, and what the result was thought to be.

        Arguments and errors are as for `generate`; `decode` makes a clip of latents.
        """
        drawn = self.sampling(steps=steps, guidance=guidance, sampler=sampler)
        return trace_latents(self._denoiser, self._latent_requests([request]), **self._how(drawn, 1))[0]

    def generate_many(
        self,
        requests: Sequence[Request],
        *,
        steps: int | None = None,
        guidance: Scale | None = None,
        sampler: str | None = None,
    ) -> list[Clip]:
        """The clips of all requests, of any sizes, packed and sampled together. Arguments are as for `generate`.

        A request has its own images, in models that take them: `Request(prompt, size, image=pixels)`.
        """
        drawn = self.sampling(steps=steps, guidance=guidance, sampler=sampler)
        asked = self._latent_requests(requests)
        return self._clips(sample_latents(self._denoiser, asked, **self._how(drawn, len(asked))), requests)

    def encode(self, clip: Clip) -> Float32[np.ndarray, "t h w c"]:
        """Normalised latents of a clip whose size fits the stride.

        Raises:
          UserError: a size that does not fit.
        """
        return self.codec.encode(clip)

    def decode(self, latents: Float32[np.ndarray, "t h w c"], *, caption: str = "") -> Clip:
        """The clip of normalised latents.

        Raises:
          UserError: latents of another number of channels, or that are not finite.
        """
        return self.codec.decode(latents, fps=self.config.fps, caption=caption)

    def reconstruct(self, clip: Clip) -> Clip:
        """A clip as the autoencoder sees it."""
        return self.codec.reconstruct(clip)

    @property
    def denoiser_params(self) -> dict[str, Any]:
        """`{"dit": ..., "text": ...}`, and of two experts `"low_noise"`"""
        return self._denoiser.params

    def parameter_counts(self) -> dict[str, int]:
        """How many parameters each part has."""
        return {"autoencoder": self.codec.parameter_count()} | {
            name: count(part) for name, part in self._denoiser.params.items()
        }

    def save(self, folder: str | Path, *, dtype: str = "float32") -> None:
        """Write a pipeline folder, whole or not at all; weights are cast to `dtype` (float32 or bfloat16).

        Raises:
          UserError: another dtype, or a folder that holds something else than a pipeline.
        """
        folder = Path(folder)
        if dtype not in _DTYPES:
            raise UserError(f"weights are saved as {' or '.join(_DTYPES)}, not {dtype}")
        if folder.exists() and not (folder / CONFIG).is_file() and not _is_empty(folder):
            raise UserError(f"{folder} exists and holds no pipeline; name a folder that does not exist")
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            save_weights(temporary / _AUTOENCODER, self.codec.params, dtype=jnp.dtype(dtype))
            save_weights(temporary / _DENOISER, self._denoiser.params, dtype=jnp.dtype(dtype))
            write_json(temporary / CONFIG, {"format": FORMAT, "config": config_json.to_json(self.config)})

    def with_text_encoder(self, folder: str | Path) -> "Pipeline":
        """The same pipeline, whose frozen text encoder lies in another folder now.

        Raises:
          UserError: the text encoder was trained with the denoiser.
        """
        config = replace(self.config, text=moved(self.config.text, folder))
        return Pipeline(config, autoencoder=self.codec.params, denoiser=self._denoiser.params)

    def load_lora(self, path: str | Path, scale: float | int = 1.0, *, expert: Expert = "dit") -> "Pipeline":
        """The same pipeline with an adapter merged into its denoiser; this one is as before.

        Several are stacked by asking the result again: `pipe.load_lora(style, 0.8).load_lora(motion, 0.5)`. A scale of
        the opposite sign takes an adapter away again, but for rounding.

        Args:
          path: a safetensors file, or a folder of PEFT or diffusers. Names of modules are our own, as training writes
            them; of Wan also those of diffusers (PEFT), ComfyUI and kohya.
          scale: how much of it is added.
          expert: which of two it is for: `dit`, the one of noisy times, or `low_noise`.

        Raises:
          MissingError: no such file.
          UserError: one that is no LoRA of this model, or a second expert that the model doesn't have.
        """
        params = self._denoiser.params
        if expert not in params:
            raise UserError(f"this model has no expert {expert!r}; it is one, leave expert away")
        known = own_modules(params)
        if isinstance(self.config.dit, WanDitConfig):
            known |= {
                name: module._replace(path=f"{expert}/{module.path}")
                for name, module in wan_modules(self.config.dit).items()
            }
        adapted = copy.copy(self)  # with the same open text encoder
        merged = merge_lora(params, load_lora(path, params, known), float(scale))
        adapted._denoiser = self._denoiser._replace(params=params | merged)  # parts without parameters too
        return adapted

    def sampling(
        self, *, steps: int | None = None, guidance: Scale | None = None, sampler: str | None = None
    ) -> Sampling:
        """The pipeline's own sampling, with what is given in its place.

        Raises:
          UserError: an unknown sampler, or less than one step.
        """
        changes: dict[str, Any] = {}
        if steps is not None:
            changes["steps"] = steps
        if guidance is not None:
            changes["guidance"] = _guidance(self.config.sampling, guidance)
        if sampler is not None:
            changes["solver"] = sampler_of(sampler)
        return replace(self.config.sampling, **changes)

    def _how(self, sampling: Sampling, count: int) -> dict[str, Any]:
        """So many requests are sampled."""
        if sampling.full_guidance.branches > 1 and self.config.caption_dropout == 0:
            warnings.warn(
                "guidance leads away from what the model makes without a caption, and this one was trained without "
                "caption dropout; use guidance=1, or train it with caption_dropout",
                stacklevel=3,
            )
        return {"sampling": sampling, "shape": self.config.row_shape, "rows": max(1, min(self.config.batch, count))}

    def _latent_requests(
        self,
        requests: Sequence[Request],
        *,
        noise: Float32[np.ndarray, "t h w c"] | None = None,
    ) -> list[LatentRequest]:
        config = self.config
        latent_requests = []
        for request in requests:
            if not 0 <= request.seed < 2**32:
                raise UserError(f"a seed is a whole number from 0 to {2**32 - 1}, not {request.seed}")
            grid = config.latent_grid(as_grid(request.size))
            shape = (*grid, config.autoencoder.channels)
            start = (
                initial_noise(request.seed, grid, config.autoencoder.channels) if noise is None else np.asarray(noise)
            )
            if start.shape != shape:
                raise UserError(f"noise for {'x'.join(map(str, request.size))} has shape {shape}, not {start.shape}")
            if not np.isfinite(start).all():
                raise UserError("the noise to start from holds NaN or infinity; draw standard normal noise")
            told = self._images(as_grid(request.size), request.image, request.last_image)
            latent_requests.append(
                LatentRequest(request.prompt, request.negative, start.astype(np.float32), told, request.seed)
            )
        return latent_requests

    def _clips(self, latents: Sequence[Float32[np.ndarray, "_ _ _ c"]], requests: Sequence[Request]) -> list[Clip]:
        """Decode clips of one size together, so that a size compiles once."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, values in enumerate(latents):
            by_shape.setdefault(values.shape, []).append(index)
        clips: dict[int, Clip] = {}
        for members in by_shape.values():
            batch = min(_BATCH, len(members))
            for start in range(0, len(members), batch):
                part = members[start : start + batch]
                stacked = np.stack([latents[index] for index in part] + [latents[part[-1]]] * (batch - len(part)))
                for index, decoded in zip(part, self.codec.decode_many(stacked), strict=False):
                    clips[index] = Clip(frames=decoded, fps=self.config.fps, caption=requests[index].prompt)
        return [clips[index] for index in range(len(latents))]


def load_pipeline(folder: str | Path, *, text_encoder: str | Path | None = None) -> Pipeline:
    """Read a pipeline folder.

    Args:
      folder: of the pipeline.
      text_encoder: where its frozen text encoder lies, if not where the pipeline says.
        It is opened at the first prompt.

    Raises:
      MissingError: no such folder, or one that holds no pipeline.
      UserError: one of another version, whose weights are not those of its config, or whose text encoder is not frozen.
    """
    folder = Path(folder)
    document = read_document(folder / CONFIG, format=FORMAT, what="pipeline", otherwise="export it again")
    config = config_json.from_json(document.get("config"))
    if not isinstance(config, PipelineConfig):
        raise UserError(f"{folder / CONFIG} holds no pipeline's config; export it again")
    pipeline = Pipeline(
        config,
        autoencoder=load_weights(folder / _AUTOENCODER, like=param_shapes(config.autoencoder.make)),
        denoiser=load_weights(folder / _DENOISER, like=config.denoiser_shapes),
    )
    return pipeline if text_encoder is None else pipeline.with_text_encoder(text_encoder)


def _guidance(own: Sampling, given: Scale) -> float | tuple[float, float] | Guidance:
    """What takes the place of a pipeline's own: of numbers alone, the scale."""
    if isinstance(given, Guidance):
        return given
    scale = (float(given[0]), float(given[1])) if isinstance(given, tuple) else float(given)
    return own.guided(scale=scale) if isinstance(own.guidance, Guidance) else scale


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def identity(config: AutoencoderConfig, params: dict[str, Any]) -> str:
    """A hash of an autoencoder's config and weights: latents of one are of no use to another.

    Options at their default don't count, so that a new one leaves the latents of before valid; nor do those that say
    how the same is computed (a field's metadata has `how`).
    """
    chosen = {
        field.name: config_json.to_json(getattr(config, field.name))
        for field in fields(cast(Any, config))
        if not field.metadata.get("how") and getattr(config, field.name) != field.default
    }
    digest = hashlib.sha256(f"{type(config).__qualname__} {chosen}".encode())
    for name, leaf in sorted(flatten(params).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
