"""Pipeline of a trained model: prompts in, clips out.

A pipeline folder holds `pipeline.json` (the configs), `autoencoder.safetensors` and `denoiser.safetensors`: no pickle,
and nothing of the training state.
"""

import contextlib
import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.core.files import atomic_path
from dit_video.core.trees import count_values as count
from dit_video.diffusion import Solver, get_sampler
from dit_video.distributed import MeshConfig
from dit_video.distributed.gather import gather_parts, is_first_process
from dit_video.encoders.autoencoder import LatentCodec
from dit_video.encoders.text import open_tokenizer, set_encoder_folder
from dit_video.generation import Denoiser, LatentTrace, Sampling, sample_latents, trace_latents
from dit_video.generation.preparation import make_sampling_request
from dit_video.generation.request import Request, TaskModel
from dit_video.generation.sharding import put_params
from dit_video.nn import Backend, get_graph_def, merge_lora
from dit_video.pipelines.config import PipelineConfig, PreviousStep, to_grid
from dit_video.pipelines.devices import PipelineDevices
from dit_video.pipelines.folder import AUTOENCODER, CONFIG, DENOISER, STEPS, write_pipeline_config
from dit_video.pipelines.options import GenerateOptions, GuidanceScale, SamplingOverrides, resolve_guidance
from dit_video.video import Clip
from dit_video.weights import get_native_modules, load_lora
from dit_video.weights import save as save_weights
from dit_video.weights.lora import GetLoraModules, no_lora_modules

_DECODE_BATCH = 8
"""Number of clips that are decoded at once."""
_DTYPES = ("float32", "bfloat16")
ExpertName = Literal["backbone", "low_noise"]


class Pipeline:
    """A trained autoencoder, denoiser and text encoder: prompts to clips, clips to latents and back."""

    def __init__(
        self,
        config: PipelineConfig,
        *,
        autoencoder: dict[str, Any],
        denoiser: dict[str, Any],
        previous: Mapping[str, "Pipeline"] | None = None,
        get_lora_modules: GetLoraModules = no_lora_modules,
        mesh: MeshConfig | Mesh | None = None,
    ):
        """Create a pipeline, with its weights on the devices.

        Args:
          config: its configuration.
          autoencoder: parameters of the autoencoder, nested dictionaries of arrays.
          denoiser: parameters of the denoisers and of the text encoder.
          previous: pipelines of the config's previous steps, by name.
          get_lora_modules: names of linear maps in LoRA files of other projects that `load_lora` accepts.
          mesh: devices that sample together; None for one device. Arrays that are on its devices stay as they are.

        Raises:
          UserError: previous steps other than the config's, a mesh that does not fit the devices or the denoiser, or
            attention whose kernels the devices lack.
        """
        self.config = config
        self._mesh = mesh
        self._devices = PipelineDevices.from_mesh(mesh, config.backbone)
        self._previous = dict(previous or {})
        if set(self._previous) != (names := {step.name for step in config.previous}):
            raise UserError(f"previous={sorted(self._previous)} is invalid: the config has {sorted(names)}. Use these.")
        self._get_lora_modules = get_lora_modules
        self.codec = LatentCodec(config.autoencoder, put_params(autoencoder, None))
        """Autoencoder with its parameters."""
        self._clip_codec = self._devices.make_clip_codec(self.codec)
        self.task_model = TaskModel(
            backbone=config.backbone,
            codec=self.codec,
            frame_conditioning=config.frame_conditioning,
            image_encoder_folder=config.image_encoder,
        )
        self._denoiser = Denoiser(
            backbone=get_graph_def(config.backbone.make, self._devices.parallel),
            text=get_graph_def(config.text.make),
            params=self._devices.put_denoiser(denoiser, is_swapped=config.boundary is not None),
            tokenizer=open_tokenizer(config.text),
            process=config.process,
            prediction=config.prediction,
            patch=config.backbone.patch,
            boundary=config.boundary,
            token_dt=config.token_dt,
            mesh=self._devices.mesh,
        )

    @overload
    def generate(
        self, prompt: str | int, *, output: Literal["clip"] = ..., **options: Unpack[GenerateOptions]
    ) -> Clip: ...

    @overload
    def generate(
        self, prompt: str | int, *, output: Literal["latents"], **options: Unpack[GenerateOptions]
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
        conditioning=None,
        strengths=None,
        task=None,
        output="clip",
    ):
        """Generate one clip from a prompt.

        Args:
          prompt: content of the clip, or its class by name or number; empty samples without condition.
          size: frames, height and width in pixels; the training size by default. Frames are 1 + k * temporal stride.
          steps: number of sampling steps; more are slower and closer to the exact flow.
          guidance: guidance scale, which trades variety for prompt following; 1 is none. Two numbers are for two
            experts, noisy times first. `Guidance` has an interval, rescaling, projection and an image scale besides.
          negative: negative prompt, which replaces the empty prompt (or no class) in guidance.
          seed: random seed; the same seed, size and model give the same clip.
          sampler: a name in `dit_video.diffusion.SAMPLERS`, or a solver. Noise that it draws depends on the seed.
          noise: initial noise `[t h w c]` of the latents' size, standard normal, instead of the seed's.
          image: first frame, a clip of one frame or pixels `[H W 3]` of its size; Wan's I2V needs it, TI2V accepts it.
          last_image: last frame, for models that accept one.
          conditioning: values of further conditioning that the model was trained with, by name; what previous steps
            sample may be left out.
          strengths: strengths of further conditioning, by name; 1 by default.
          task: a `GenerationTask` other than text to video and, with an image, image to video.
          output: `clip`, or `latents` for normalised latents `[t h w c]`.

        Raises:
          UserError: an unsupported size (the message names the nearest), an unknown class or sampler, less than one
            step, a seed that is not a whole number below 2**32, noise of another shape, images or a task that do not
            fit size or model, or a model whose values become NaN or infinite.
        """
        if output not in ("clip", "latents"):
            raise UserError(f"unknown output {output!r}; use clip or latents")
        size = self.config.size if size is None else to_grid(size)
        values = conditioning or {}, strengths or {}
        request = Request(str(prompt), size, seed, negative, image, last_image, *values, task)
        prepared = self._prepare([request], noise, steps=steps, guidance=guidance, sampler=sampler)
        latents = sample_latents(self._denoiser, **prepared)
        return latents[0] if output == "latents" else self.decode_many(latents, [request])[0]

    def trace(self, request: Request, **overrides: Unpack[SamplingOverrides]) -> LatentTrace:
        """Sample one request and return the latents and the predicted clean latents after every step.

        `decode` makes a clip of latents. `steps`, `guidance`, `sampler` and errors are as for `generate`.
        """
        return trace_latents(self._denoiser, **self._prepare([request], **overrides))[0]

    def generate_many(self, requests: Sequence[Request], **overrides: Unpack[SamplingOverrides]) -> list[Clip]:
        """Generate the clips of all requests, of any sizes, packed and sampled together.

        A request has its own images, in models that accept them: `Request(prompt, size, image=pixels)`. `steps`,
        `guidance`, `sampler` and errors are as for `generate`.
        """
        return self.decode_many(sample_latents(self._denoiser, **self._prepare(requests, **overrides)), requests)

    def generate_latents(
        self, requests: Sequence[Request], **overrides: Unpack[SamplingOverrides]
    ) -> list[Float32[np.ndarray, "_ _ _ c"]]:
        """Generate normalised latents `t h w c` of all requests; arguments and errors are as for `generate_many`.

        On a mesh of several processes all of them call this, and all get the latents.
        """
        return sample_latents(self._denoiser, **self._prepare(requests, **overrides))

    def encode(self, clip: Clip) -> Float32[np.ndarray, "t h w c"]:
        """Encode a clip, whose size fits the stride, to normalised latents.

        Raises:
          UserError: the size does not fit.
        """
        return self.codec.encode(clip)

    def decode(self, latents: Float32[np.ndarray, "t h w c"], *, caption: str = "", seed: int = 0) -> Clip:
        """Decode normalised latents to a clip; `seed` is for autoencoders whose decoder takes noise.

        Raises:
          UserError: latents with another number of channels, or that are not finite.
        """
        return self.codec.decode(latents, fps=self.config.fps, caption=caption, seed=seed)

    def decode_many(self, latents: Sequence[Float32[np.ndarray, "_ _ _ c"]], requests: Sequence[Request]) -> list[Clip]:
        """Decode the latents of requests to clips: those of one size together, so that a size compiles once.

        On a mesh, this process's devices share the clips of a size.
        """
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, values in enumerate(latents):
            by_shape.setdefault(values.shape, []).append(index)
        clips: dict[int, Clip] = {}
        for members in by_shape.values():
            codec, batch = self.codec, min(_DECODE_BATCH, len(members))
            if self._clip_codec is not None and len(members) > 1:
                codec, batch = self._clip_codec, self._devices.local_count
            for start in range(0, len(members), batch):
                part = members[start : start + batch]
                stacked = np.stack([latents[index] for index in part] + [latents[part[-1]]] * (batch - len(part)))
                seeds = [requests[index].seed for index in part] + [0] * (batch - len(part))
                for index, decoded in zip(part, codec.decode_many(stacked, seeds=seeds), strict=False):
                    clips[index] = Clip(frames=decoded, fps=self.config.fps, caption=requests[index].prompt)
        return [clips[index] for index in range(len(latents))]

    def reconstruct(self, clip: Clip) -> Clip:
        """Encode and decode a clip."""
        return self.codec.reconstruct(clip)

    @property
    def denoiser_params(self) -> dict[str, Any]:
        """Return `{"backbone": ..., "text": ...}`, and `"low_noise"` of models with two experts."""
        return self._denoiser.params

    def add_previous_step(self, step: PreviousStep, pipeline: "Pipeline") -> "Pipeline":
        """Return the pipeline with a step before it, whose samples are values of its conditioning.

        For example, a text-to-video model of low resolution before a model that makes its clips larger:

            both = large.add_previous_step(PreviousStep(name="low_resolution", size=Downscale(h=2, w=2)), small)

        Requests that give a value of this conditioning skip the step. It is sampled with its own options, for the
        request's prompts and seed. `save` writes all steps to one folder.

        Raises:
          UserError: this model has no conditioning of the name.
        """
        names = [each.field.name for each in self.config.backbone.conditioning]
        if step.name not in names:
            fix = f"Use {', '.join(names)}." if names else "Use a model with conditioning by fields."
            raise UserError(f"name={step.name!r} of a step is invalid: this model has no such conditioning. {fix}")
        extended = copy.copy(self)
        extended._previous = self._previous | {step.name: pipeline}
        others = (each for each in self.config.previous if each.name != step.name)
        extended.config = replace(self.config, previous=(*others, step))
        return extended

    def count_parameters(self) -> dict[str, int]:
        """Return the number of parameters of each part."""
        denoiser = {name: count(part) for name, part in self._denoiser.params.items()}
        return {"autoencoder": self.codec.count_parameters()} | denoiser

    def save(self, folder: str | Path, *, dtype: str = "float32") -> None:
        """Write a pipeline folder, complete or not at all; weights are cast to `dtype` (float32 or bfloat16).

        On a mesh of several processes all of them call this. Weights are gathered to the first one in parts, which
        writes them.

        Raises:
          UserError: another dtype, or a folder that holds something other than a pipeline.
        """
        folder, is_writer = Path(folder), is_first_process()
        if dtype not in _DTYPES:
            raise UserError(f"dtype={dtype} is invalid: weights are saved as {' or '.join(_DTYPES)}")
        is_empty = folder.is_dir() and not any(folder.iterdir())
        if folder.exists() and not (folder / CONFIG).is_file() and not is_empty:
            raise UserError(f"{folder} exists and holds no pipeline; use a folder that does not exist")
        with atomic_path(folder) if is_writer else contextlib.nullcontext(folder) as temporary:
            if is_writer:
                temporary.mkdir()
                save_weights(temporary / AUTOENCODER, self.codec.params, dtype=jnp.dtype(dtype))
                write_pipeline_config(temporary, self.config)
            denoiser = gather_parts(self._denoiser.params)
            save_weights(temporary / DENOISER, denoiser, dtype=jnp.dtype(dtype), is_writer=is_writer)
            for name, pipeline in self._previous.items():
                pipeline.save(temporary / STEPS / name, dtype=dtype)

    def with_text_encoder(self, folder: str | Path) -> "Pipeline":
        """Return the same pipeline with its frozen text encoder in another folder.

        Raises:
          UserError: the text encoder was trained with the denoiser.
        """
        return self._with_config(replace(self.config, text=set_encoder_folder(self.config.text, folder)))

    def with_attention(self, backend: Backend) -> "Pipeline":
        """Return the same pipeline, with its weights, that computes attention by another backend.

        Raises:
          UserError: a backend that does not support the denoiser's patterns, or whose kernels the devices lack.
        """
        return self._with_config(replace(self.config, backbone=self.config.backbone.replace(attention=backend)))

    def _with_config(self, config: PipelineConfig) -> "Pipeline":
        return Pipeline(
            config,
            autoencoder=self.codec.params,
            denoiser=self._denoiser.params,
            previous=self._previous,
            get_lora_modules=self._get_lora_modules,
            mesh=self._mesh,
        )

    def load_lora(self, path: str | Path, scale: float | int = 1.0, *, expert: ExpertName = "backbone") -> "Pipeline":
        """Return the same pipeline with an adapter merged into its denoiser; this one is unchanged.

        Calls are chained to stack several: `pipe.load_lora(style, 0.8).load_lora(motion, 0.5)`. The negative scale
        removes an adapter again, up to rounding.

        Args:
          path: a safetensors file, or a folder of PEFT or diffusers. Module names are our own, as training writes them;
            of Wan also those of diffusers (PEFT), ComfyUI and kohya.
          scale: strength of the adapter.
          expert: expert of two that is adapted: `backbone`, for noisy times, or `low_noise`.

        Raises:
          MissingError: no file at `path`.
          UserError: a file that is not a LoRA of this model, or a second expert that the model does not have.
        """
        params = self._denoiser.params
        if expert not in params:
            raise UserError(f"expert={expert!r} is invalid: this model has one expert; leave out expert")
        names = get_native_modules(params)
        modules = self._get_lora_modules(self.config.backbone)
        names |= {name: module._replace(path=f"{expert}/{module.path}") for name, module in modules.items()}
        adapted = copy.copy(self)  # shares the open text encoder
        merged = merge_lora(params, load_lora(path, params, names), float(scale))
        everything = params | merged  # `merged` lacks parts without parameters
        placed = self._devices.put_denoiser(everything, is_swapped=self.config.boundary is not None)
        adapted._denoiser = self._denoiser._replace(params=placed)
        return adapted

    def resolve_sampling(
        self, *, steps: int | None = None, guidance: GuidanceScale | None = None, sampler: str | Solver | None = None
    ) -> Sampling:
        """Return the pipeline's own sampling with the given values replaced.

        Raises:
          UserError: an unknown sampler, or less than one step.
        """
        changes: dict[str, Any] = {}
        if steps is not None:
            changes["steps"] = steps
        if guidance is not None:
            changes["guidance"] = resolve_guidance(self.config.sampling, guidance)
        if sampler is not None:
            changes["solver"] = get_sampler(sampler) if isinstance(sampler, str) else sampler
        return replace(self.config.sampling, **changes)

    def _prepare(
        self,
        requests: Sequence[Request],
        noise: Float32[np.ndarray, "t h w c"] | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> dict[str, Any]:
        """Return arguments of `sample_latents`; warn if guidance has no trained unconditional branch."""
        sampling, config = self.resolve_sampling(**overrides), self.config
        if sampling.full_guidance.branch_count > 1 and config.caption_dropout == 0:
            warnings.warn(
                "guidance needs an unconditional model, and this one was trained without caption dropout; use "
                "guidance=1, or train it with caption_dropout",
                stacklevel=3,
            )
        latent_requests = [
            make_sampling_request(request, config.latent_grid(to_grid(request.size)), self.task_model, noise)
            for request in self._sample_previous_steps(requests)
        ]
        rows = max(1, min(config.batch, len(requests)))
        return {"requests": latent_requests, "sampling": sampling, "shape": config.row_shape, "rows": rows}

    def _sample_previous_steps(self, requests: Sequence[Request]) -> list[Request]:
        """Return the requests with the values of conditioning that previous steps sample."""
        requests = list(requests)
        for step in self.config.previous:
            pipeline = self._previous[step.name]
            own = [index for index, request in enumerate(requests) if step.name not in request.conditioning]
            parts = []
            for index in own:
                prompt, size, seed, negative, *_ = requests[index]
                parts.append(Request(prompt, step.get_size(to_grid(size), pipeline.config.size), seed, negative))
            sample = pipeline.generate_many if step.output == "clip" else pipeline.generate_latents
            for index, value in zip(own, sample(parts) if parts else [], strict=True):
                conditioning = {**requests[index].conditioning, step.name: value}
                requests[index] = requests[index]._replace(conditioning=conditioning)
        return requests
