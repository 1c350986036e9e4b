"""Pipeline of a trained model: prompts in, clips out.

A pipeline folder holds `pipeline.json` (the configs), `autoencoder.safetensors` and `denoiser.safetensors`: no pickle,
and nothing of the training state.
"""

import contextlib
import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32

from dit_video.core.errors import UserError
from dit_video.core.files import atomic_path
from dit_video.core.memory import name_exhausted_memory
from dit_video.core.offload import Offload
from dit_video.core.trees import count_values as count
from dit_video.core.trees import flatten, unflatten
from dit_video.data.latents.codec import LatentCodec
from dit_video.diffusion import Euler
from dit_video.distributed import Parallelism
from dit_video.distributed.gather import gather_parts, is_first_process
from dit_video.models.autoencoders import Tiles
from dit_video.models.model_config import ModelConfig
from dit_video.nn import Backend
from dit_video.sampling import LatentTrace, Monitor, Sampling, sample_latents, trace_latents
from dit_video.sampling.adapters import AdaptedWeights, Adapter, ExpertName, list_lora_modules, split_factors
from dit_video.sampling.clip_functions import ClipFunction, compute_clip_function
from dit_video.sampling.clip_recipe import make_recipe
from dit_video.sampling.devices import ClipDecoder, PipelineDevices
from dit_video.sampling.edit_paths import LatentStepper
from dit_video.sampling.pipeline_config import (
    AUTOENCODER,
    CONFIG,
    DENOISER,
    PREVIEW,
    STEPS,
    PipelineConfig,
    PreviousStep,
    make_denoiser,
    make_task_model,
    to_grid,
    write_pipeline_config,
)
from dit_video.sampling.preparation import prepare_request, resolve_sampling
from dit_video.sampling.preview import PreviewDecoder
from dit_video.sampling.progress import Callback, make_monitor
from dit_video.sampling.request import GenerateOptions, Request, split_options
from dit_video.sampling.sampling_config import SamplingOverrides
from dit_video.sampling.tasks import (
    AnyTask,
    Blend,
    ClipTask,
    DescribedEdit,
    Edit,
    EditMethod,
    Extend,
    Inpaint,
    Interpolate,
    Loop,
    Outpaint,
    Vary,
    ZoomOut,
)
from dit_video.video import Clip
from dit_video.weights import load_lora
from dit_video.weights import save as save_weights
from dit_video.weights.frozen_encoders import open_tokenizer, set_encoder_folder
from dit_video.weights.lora import GetLoraModules, no_lora_modules

_DTYPES = ("float32", "bfloat16")
_DECODING_FIX = "Use with_decoding(memory=...) (--decode-memory) with less, or tiles of the frames (--decode-tiles)"


class Pipeline:
    """A trained autoencoder, denoiser and text encoder: prompts to clips, clips to latents and back.

    Methods of tasks (`extend`, `inpaint`, …) take the options of `generate`: `seed`, `negative`, `method`, `resample`,
    `steps`, `guidance`, …. They raise `UserError` for sizes and values that do not fit.
    """

    def __init__(
        self,
        config: PipelineConfig,
        *,
        autoencoder: dict[str, Any],
        denoiser: dict[str, Any],
        previous: Mapping[str, "Pipeline"] | None = None,
        get_lora_modules: GetLoraModules = no_lora_modules,
        parallel: Parallelism | None = None,
        offload: Offload | None = None,
    ):
        """Create a pipeline, with its weights on the devices.

        Args:
          config: Its configuration.
          autoencoder: Parameters of the autoencoder, nested dictionaries of arrays.
          denoiser: Parameters of the denoisers and of the text encoder.
          previous: Pipelines of the config's previous steps, by name.
          get_lora_modules: Names of linear maps in LoRA files of other projects that `load_lora` accepts.
          parallel: Devices that sample together; None for one device. Arrays that are on its devices stay as they are.
          offload: Weights in host memory; None for weights that stay on the devices.

        Raises:
          UserError: If the previous steps are not the config's, `parallel` does not fit the devices or the denoiser, or
            the devices lack the kernels of the attention.
        """
        self.config = config
        self._parallel, self._offload = parallel, offload
        self._devices = PipelineDevices.make(parallel, config.model.backbone)
        self._previous = dict(previous or {})
        if set(self._previous) != (names := {step.name for step in config.previous}):
            raise UserError(f"previous={sorted(self._previous)} is invalid: the config has {sorted(names)}. Use these.")
        self._get_lora_modules = get_lora_modules
        codec_params = self._devices.put(autoencoder, offload=offload, mesh=None)
        self._set_codec(LatentCodec(config.model.autoencoder, codec_params))
        self._denoiser = make_denoiser(
            config,
            self._devices.put(denoiser, offload=offload, mesh=self._devices.mesh),
            open_tokenizer(config.model.text_encoder, offload=offload),
            partitioner=self._devices.partitioner,
            mesh=self._devices.mesh,
            offload=offload,
        )
        self._weights = AdaptedWeights(self._denoiser.params)
        self.preview_decoder: PreviewDecoder | None = None
        """Decoder of quick previews; None if the pipeline's folder has none."""

    @overload
    def generate(
        self,
        prompt: str | int,
        *,
        output: Literal["clip"] = ...,
        callback: Callback | None = ...,
        **options: Unpack[GenerateOptions],
    ) -> Clip: ...

    @overload
    def generate(
        self,
        prompt: str | int,
        *,
        output: Literal["latents"],
        callback: Callback | None = ...,
        **options: Unpack[GenerateOptions],
    ) -> Float32[np.ndarray, "t h w c"]: ...

    def generate(self, prompt, *, output="clip", callback=None, **options: Any):
        """Generate one clip from a prompt.

        Args:
          prompt: Content of the clip, or its class by name or number; an empty one samples without a condition.
          size: Frames, height and width in pixels; the training size by default, with the aspect ratio of an image if
            there is one. Frames are 1 + k * temporal stride.
          steps: Number of sampling steps; more are slower and closer to the exact flow.
          guidance: Guidance scale, which trades variety for prompt following; 1 is none. Two numbers are for two
            experts, noisy times first. `Guidance` has an interval, rescaling, projection and an image scale besides.
          negative: Negative prompt, which replaces the empty prompt (or no class) in guidance; the model's own by
            default (`config.negative`), none if empty.
          seed: Random seed; the same seed, size and model give the same clip.
          sampler: A name in `dit_video.diffusion.SAMPLERS`, or a solver. Noise that it draws depends on the seed.
          shift: Shift of the times towards noise, instead of that of training.
          times: Falling times at which the steps start, in (0, 1]; the last step leads to 0. With `shift` they are
            shifted by it, otherwise they are taken as they are.
          noise: Initial noise `[t h w c]` of the latents' size, standard normal, instead of the seed's.
          image: First frame, a clip of one frame or pixels `[H W 3]` (Wan's I2V needs it). All pictures are fitted to
            the size: scaled to cover it, and cropped on both sides alike.
          last_image: Last frame.
          video: Clip that is kept where `mask` is True, or that `strength` changes.
          mask: Pixels `[T H W]`, or frames `[T]`, of `video` that are kept (True).
          strength: Diffusion time, in (0, 1], that `video` is noised to and sampling starts at.
          control: Clip that steers what is generated (poses, depth, edges), in models that accept one.
          reference_images: Images of subjects that the clip shows, in models that accept them.
          conditions: Images and clips at some frames, each a `Condition`.
          method: Way to keep known pixels: `trained`, `training_free`, or `auto` (the default): as trained where the
            model was, and without training elsewhere; see `docs/tasks.md`.
          resample: Number of times that training-free sampling takes every part of the steps.
          conditioning: Values of further conditioning that the model was trained with, by name. Values that previous
            steps sample may be left out.
          strengths: Strengths of further conditioning, by name; 1 by default.
          task: A `GenerationTask` other than the model's own.
          output: `clip`, or `latents` for normalised latents `[t h w c]`.
          callback: Called with a `PipelineProgress` after every few steps; what it raises ends the sampling.

        Raises:
          UserError: If the size is not supported (the message names the nearest), the class or the sampler is unknown,
            `steps` is below 1, the shift or the times are invalid, the seed is not a whole number below 2**32, the
            noise has another shape, images or a task do not fit size or model, or values become NaN or infinite.
        """
        if output not in ("clip", "latents"):
            raise UserError(f"unknown output {output!r}; use clip or latents")
        request, overrides = split_options(prompt, options)
        if output == "clip":
            return self.generate_many([request], callback=callback, **overrides)[0]
        return self.generate_latents([request], callback=callback, **overrides)[0]

    def trace(self, request: Request, **overrides: Unpack[SamplingOverrides]) -> LatentTrace:
        """Sample one request and return the latents and the predicted clean latents after every step.

        `decode` makes a clip of latents. `overrides` and errors are as for `generate`.
        """
        return trace_latents(self._denoiser, **self._prepare([request], **overrides))[0]

    def generate_many(
        self, requests: Sequence[Request], *, callback: Callback | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> list[Clip]:
        """Generate the clips of all requests, of any sizes, packed and sampled together.

        A request has its own images, in models that accept them: `Request(prompt, size, image=pixels)`. `overrides`
        (`steps`, `guidance`, `sampler`, `shift`, `times`) and errors are as for `generate`.
        """
        self.check_decoding(requests)
        prepared = self._prepare(requests, **overrides)
        latents = sample_latents(self._denoiser, **prepared, monitor=self.make_monitor(callback))
        clips = []
        for request, clip, planned in zip(
            requests, self.decode_many(latents, requests), prepared["requests"], strict=True
        ):
            sized = request._replace(size=self.config.resolve_size(request))
            recipe = make_recipe(self.config, sized, planned.plan, prepared["sampling"])
            clips.append(replace(clip, recipe=recipe))
        return clips

    def generate_latents(
        self, requests: Sequence[Request], *, callback: Callback | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> list[Float32[np.ndarray, "_ _ _ c"]]:
        """Generate normalised latents `t h w c` of all requests; arguments and errors are as for `generate_many`.

        On a mesh of several processes all of them call this, and all get the latents.
        """
        prepared = self._prepare(requests, **overrides)
        return sample_latents(self._denoiser, **prepared, monitor=self.make_monitor(callback))

    def run_tasks(
        self,
        tasks: Sequence[AnyTask],
        *,
        seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Clip]:
        """Run tasks on clips of any sizes: packed and sampled together, then composite tasks one after the other.

        Args:
          tasks: The tasks, such as `Extend(clip=clip, frames=16)`.
          seeds: Seed of each task; by default that of `options` for all.
          callback: Called with a `PipelineProgress` after every few steps.
          options: Options of `generate` for all tasks.
        """
        shared, overrides = split_options("", options)
        values = {name: getattr(shared, name) for name in options if name in Request._fields}
        seeds = [shared.seed] * len(tasks) if seeds is None else seeds
        requests = {
            number: _add_options(task.make_request(self.config), {**values, "seed": seed})
            for number, (task, seed) in enumerate(zip(tasks, seeds, strict=True))
            if isinstance(task, ClipTask)
        }
        clips = self.generate_many(list(requests.values()), callback=callback, **overrides) if requests else []
        sampled = dict(zip(requests, clips, strict=True))
        results = []
        for number, (task, seed) in enumerate(zip(tasks, seeds, strict=True)):
            if isinstance(task, ClipTask):
                clip = task.finish(sampled[number])
            else:
                clip = task.run(self, **{**options, "seed": seed, "callback": callback})
            results.append(_add_task(clip, task))
        return results

    def extend(
        self,
        clip: Clip,
        prompt: str | None = None,
        *,
        frames: int,
        before: bool = False,
        overlap: int | None = None,
        **options: Any,
    ) -> Clip:
        """Return a clip with new frames after it, or before it.

        Args:
          clip: The clip, which is kept.
          prompt: Description of the result; None for the clip's caption.
          frames: Number of new pixel frames.
          before: True for new frames before the clip.
          overlap: Number of the clip's frames that the model continues; by default the most of up to 9 that fit.
          options: Options of `generate`.
        """
        task = Extend(prompt=prompt, clip=clip, frames=frames, before=before, overlap=overlap)
        return self.run_tasks([task], **options)[0]

    def blend(
        self,
        first: Clip,
        second: Clip,
        prompt: str | None = None,
        *,
        frames: int,
        overlap: int | None = None,
        **options: Any,
    ) -> Clip:
        """Return two clips with a transition of new frames between them; both are kept.

        Args:
          first: The first clip.
          second: The second clip, of the same size and frame rate.
          prompt: Description of the transition; None for the first clip's caption.
          frames: Number of new frames.
          overlap: Number of frames of each clip that the model gets, at most.
          options: Options of `generate`.
        """
        task = Blend(prompt=prompt, first=first, second=second, frames=frames, overlap=overlap)
        return self.run_tasks([task], **options)[0]

    def interpolate(
        self,
        clip: Clip,
        prompt: str | None = None,
        *,
        factor: int | None = None,
        times: Sequence[int] | None = None,
        **options: Any,
    ) -> Clip:
        """Return a clip with new frames between its own, of the same duration.

        Args:
          clip: The clip, whose frames are kept.
          prompt: Description of the result; None for the clip's caption.
          factor: Number of intervals that every interval becomes: 2 for one new frame between any two.
          times: Instead, the numbers of the result's frames that are the clip's, in any rising pattern from 0 on.
          options: Options of `generate`.
        """
        return self.run_tasks([Interpolate(prompt=prompt, clip=clip, factor=factor, times=times)], **options)[0]

    def loop(self, prompt: str, *, size: tuple[int, int, int] | None = None, **options: Any) -> Clip:
        """Return a clip whose first frame follows its last.

        Args:
          prompt: Description of the clip.
          size: Frames, a multiple of the temporal stride, height and width.
          options: Options of `generate`.
        """
        return self.run_tasks([Loop(prompt=prompt, size=size)], **options)[0]

    def inpaint(
        self,
        clip: Clip,
        mask: Bool[np.ndarray, "T H W"] | Bool[np.ndarray, "H W"],
        prompt: str | None = None,
        **options: Any,
    ) -> Clip:
        """Return a clip with a region filled in.

        Args:
          clip: The clip, which is kept outside of the region.
          mask: The region (True = fill in, as in diffusers), the same in all frames or moving.
          prompt: Description of the result; None for the clip's caption.
          options: Options of `generate`.
        """
        return self.run_tasks([Inpaint(prompt=prompt, clip=clip, mask=mask)], **options)[0]

    def outpaint(self, clip: Clip, size: tuple[int, int], prompt: str | None = None, **options: Any) -> Clip:
        """Return a clip in the middle of a larger one, whose border is filled in.

        Args:
          clip: The clip, which is kept.
          size: Height and width of the result.
          prompt: Description of the result; None for the clip's caption.
          options: Options of `generate`.
        """
        return self.run_tasks([Outpaint(prompt=prompt, clip=clip, size=size)], **options)[0]

    def zoom_out(
        self, image: Clip, prompt: str | None = None, *, frames: int, factor: float = 1.1, **options: Any
    ) -> Clip:
        """Return a clip that zooms out of an image: every frame is the former one, smaller, with its border filled in.

        Args:
          image: First frame, a clip of one frame.
          prompt: Description of the surroundings; None for the image's caption.
          frames: Number of new frames.
          factor: Factor of the zoom in each of them.
          options: Options of `generate`.
        """
        task = ZoomOut(prompt=prompt, image=image, frames=frames, factor=factor)
        return self.run_tasks([task], **options)[0]

    def vary(self, clip: Clip, prompt: str | None = None, *, strength: float = 0.7, **options: Any) -> Clip:
        """Return a variation of a clip; every `seed` gives another.

        Args:
          clip: The clip.
          prompt: Its description; None for its caption.
          strength: Diffusion time, in (0, 1], that it is noised to; more changes it more.
          options: Options of `generate`.
        """
        return self.run_tasks([Vary(prompt=prompt, clip=clip, strength=strength)], **options)[0]

    def edit(
        self,
        clip: Clip,
        prompt: str,
        *,
        source: str | None = None,
        strength: float = 0.8,
        edit_method: EditMethod = "flow_edit",
        source_guidance: float = 1.0,
        draws: int = 1,
        **options: Any,
    ) -> Clip:
        """Return a clip that is changed to fit a prompt.

        Without `source` noise is added to the clip and taken away with the prompt (SDEdit). With it, the difference of
        both descriptions changes the clip: see `EditPaths`.

        Args:
          clip: The clip.
          prompt: Description of the result.
          source: Description of the clip.
          strength: Diffusion time, in (0, 1], at which the change begins; more changes it more.
          edit_method: With `source`, FlowEdit, or inversion of the clip to noise.
          source_guidance: With `source`, guidance scale of the clip's description.
          draws: With FlowEdit, number of noises in every step, whose changes are averaged.
          options: Options of `generate`.
        """
        if source is None:
            given = {"edit_method": edit_method, "source_guidance": source_guidance, "draws": draws}
            for name, default in {"edit_method": "flow_edit", "source_guidance": 1, "draws": 1}.items():
                if given[name] != default:
                    rule = "it needs source, a description of the clip. Give one, or leave it out."
                    raise UserError(f"{name}={given[name]!r} is invalid: {rule}")
            return self.run_tasks([Edit(prompt=prompt, clip=clip, strength=strength)], **options)[0]
        task = DescribedEdit(
            prompt=prompt,
            clip=clip,
            source=source,
            strength=strength,
            edit_method=edit_method,
            source_guidance=source_guidance,
            draws=draws,
        )
        return self.run_tasks([task], **options)[0]

    def resolve_sampling(self, **overrides: Unpack[SamplingOverrides]) -> Sampling:
        """Return the pipeline's own sampling with the given values replaced.

        Raises:
          UserError: If the sampler is unknown, `steps` is below 1, …; see `preparation.resolve_sampling`.
        """
        return resolve_sampling(self.config, **overrides)

    def make_stepper(self, request: Request, **overrides: Unpack[SamplingOverrides]) -> LatentStepper:
        """Return the denoiser and Euler's solver for the latents of a request, at any times of its steps.

        `overrides` and errors are as for `generate`.
        """
        prepared = self._prepare([request], **overrides)
        sampling = replace(prepared["sampling"], solver=Euler())
        (single,) = prepared["requests"]
        return LatentStepper(self._denoiser, single, sampling=sampling, shape=prepared["shape"])

    def make_monitor(self, callback: Callback | None) -> Monitor | None:
        """Return the sampler's monitor that calls a callback with the progress; None without one."""
        return make_monitor(callback, self.decode, preview_decoder=self.preview_decoder, fps=self.config.fps)

    def compute_clip_function(
        self,
        function: ClipFunction,
        requests: Sequence[Request],
        latents: Sequence[Float32[np.ndarray, "_ _ _ c"]],
    ) -> Float32[np.ndarray, "clips values"]:
        """Return the values of a function of the denoiser, such as a loss, for the latents of clips, packed together.

        A request has the prompt, the size and what else is known of its clip, and the seed of the function's noise.
        Errors are as for `generate_many`; on a mesh of several processes all of them call this, with the same clips.
        """
        prepared = self._prepare(requests, guidance=1.0)
        starts = zip(prepared["requests"], latents, strict=True)
        prepared["requests"] = [each._replace(plan=each.plan._replace(start=start)) for each, start in starts]
        return compute_clip_function(function, self._denoiser, **prepared)

    def encode(self, clip: Clip) -> Float32[np.ndarray, "t h w c"]:
        """Encode a clip, whose size fits the stride, to normalised latents.

        Raises:
          UserError: If the size does not fit.
        """
        return self.codec.encode(clip)

    def decode(self, latents: Float32[np.ndarray, "t h w c"], *, caption: str = "", seed: int = 0) -> Clip:
        """Decode normalised latents to a clip; `seed` is for autoencoders whose decoder takes noise.

        Raises:
          UserError: If the latents have another number of channels, or are not finite.
        """
        return self.codec.decode(latents, fps=self.config.fps, caption=caption, seed=seed)

    def decode_many(self, latents: Sequence[Float32[np.ndarray, "_ _ _ c"]], requests: Sequence[Request]) -> list[Clip]:
        """Decode the latents of requests to clips: those of one size together, so that a size compiles once.

        On a mesh, this process's devices share the clips of a size.
        """
        with name_exhausted_memory("decoding", _DECODING_FIX):
            return self._decoder(latents, requests)

    def check_decoding(self, requests: Sequence[Request]) -> None:
        """Check that the clips of requests can be decoded in the memory of `with_decoding`, before they are sampled.

        Raises:
          UserError: If the memory is too small, or a size is not supported.
        """
        self._decoder.check_memory([self.config.model.latent_grid(self.config.resolve_size(each)) for each in requests])

    def reconstruct(self, clip: Clip) -> Clip:
        """Encode and decode a clip."""
        return self.codec.reconstruct(clip)

    def add_previous_step(self, step: PreviousStep, pipeline: "Pipeline") -> "Pipeline":
        """Return the pipeline with a step before it, whose samples are values of its conditioning.

        For example, a text-to-video model of low resolution before a model that makes its clips larger:

            both = large.add_previous_step(PreviousStep(name="low_resolution", size=Downscale(h=2, w=2)), small)

        Requests that give a value of this conditioning skip the step. It is sampled with its own options, for the
        request's prompts and seed. `save` writes all steps to one folder.

        Raises:
          UserError: If this model has no conditioning of the name.
        """
        names = [each.field.name for each in self.config.model.backbone.conditioning]
        if step.name not in names:
            fix = f"Use {', '.join(names)}." if names else "Use a model with conditioning by fields."
            raise UserError(f"name={step.name!r} of a step is invalid: this model has no such conditioning. {fix}")
        extended = copy.copy(self)
        extended._previous = self._previous | {step.name: pipeline}
        others = (each for each in self.config.previous if each.name != step.name)
        extended.config = replace(self.config, previous=(*others, step))
        return extended

    def load_lora(
        self,
        path: str | Path,
        scale: float | int = 1.0,
        *,
        expert: ExpertName = "backbone",
        name: str | None = None,
        merge: bool = False,
    ) -> "Pipeline":
        """Return the pipeline with an adapter.

        It shares its weights with this one, which stays usable unless `merge` is set.

        Calls are chained for several adapters: `pipe.load_lora(style, 0.8).load_lora(motion, 0.5)`. An adapter is
        attached: its factors are kept beside the weights, and its products are computed in sampling. Another scale is
        set without copying weights or compiling.

        Args:
          path: A safetensors file, or a folder of PEFT or diffusers. Module names are our own, as training writes them;
            for Wan also the names of diffusers (PEFT), ComfyUI, kohya and LightX2V, with full differences.
          scale: Strength of the adapter.
          expert: Which of two experts is adapted: `backbone`, for noisy times, or `low_noise`.
          name: Name of the adapter in `set_lora_scales` and `unload_lora`; by default that of the file, with a number
            if another adapter has it. An adapter that is merged has none.
          merge: Adds the adapter to the weights instead, in their memory. Sampling then takes no more time than
            without it. The host keeps a copy of the changed weights for `unload_lora`. This pipeline, and others that
            share its weights on devices, cannot be used any more.

        Raises:
          MissingError: If there is no file at `path`.
          UserError: If the file is no LoRA of this model, the model has no second expert, an adapter has the name, or
            there is a name for an adapter that is merged.
        """
        weights = self._weights
        weights.check_usable()
        if name is not None and merge:
            fix = "Leave it out; unload_lora() takes away all that is merged"
            raise UserError(f"name={name!r} is invalid: an adapter that is merged has no name. {fix}")
        if name is not None and name in weights.adapters:
            raise UserError(f"name={name!r} is invalid: an adapter of this name is attached. Use another name")
        modules = list_lora_modules(self.config, weights.params, self._get_lora_modules, expert)
        lora = load_lora(path, weights.params, modules)
        if merge:
            return self._with_weights(weights.merge(lora, float(scale)))
        factors, others = split_factors(lora, weights.params)
        placed = self._devices.put(factors, offload=self._offload, mesh=self._devices.mesh)
        lora = unflatten(flatten(placed) | others)
        return self._with_weights(weights.attach(name or Path(path).stem, Adapter(lora, float(scale))))

    def set_lora_scales(self, scales: Mapping[str, float | int]) -> "Pipeline":
        """Return the same pipeline with other scales of attached adapters, by their names; weights are shared.

        An adapter of scale 0 is not computed.

        Raises:
          UserError: If no attached adapter has the name.
        """
        self._weights.check_usable()
        return self._with_weights(self._weights.set_scales(scales))

    def unload_lora(self, name: str | None = None) -> "Pipeline":
        """Return the same pipeline without an attached adapter, or without all adapters, attached and merged.

        The weights are those before, bit by bit. Where adapters were merged, the host's copy takes the place of the
        weights in the devices' memory, and this pipeline cannot be used any more.

        Raises:
          UserError: If no attached adapter has the name; one that is merged has no name.
        """
        self._weights.check_usable()
        return self._with_weights(self._weights.restore() if name is None else self._weights.detach(name))

    @property
    def lora_scales(self) -> dict[str, float]:
        """Return the scales of attached adapters, by their names."""
        return {name: adapter.scale for name, adapter in self._weights.adapters.items()}

    @property
    def denoiser_params(self) -> dict[str, Any]:
        """Return `{"backbone": ..., "text": ...}`, and `"low_noise"` for models with two experts.

        Attached adapters are merged into copies of the weights that they change.
        """
        self._weights.check_usable()
        return self._weights.make_merged_params()

    def count_parameters(self) -> dict[str, int]:
        """Return the number of parameters of each part."""
        denoiser = {name: count(part) for name, part in self._weights.params.items()}
        return {"autoencoder": self.codec.count_parameters()} | denoiser

    def compute_digest(self) -> str:
        """Return a hash of some values of every array, which tells the denoiser's weights and adapters from others."""
        return self._weights.compute_digest()

    def save(self, folder: str | Path, *, dtype: str = "float32") -> None:
        """Write a pipeline folder, complete or not at all; weights are cast to `dtype` (float32 or bfloat16).

        Attached adapters are merged into what is written. On a mesh of several processes all of them call this. Weights
        are gathered in parts to the first process, which writes them.

        Raises:
          UserError: If the dtype is another one, or the folder holds something other than a pipeline.
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
                if self.preview_decoder is not None:
                    self.preview_decoder.save(temporary / PREVIEW)
            denoiser = gather_parts(self.denoiser_params)
            save_weights(temporary / DENOISER, denoiser, dtype=jnp.dtype(dtype), is_writer=is_writer)
            for name, pipeline in self._previous.items():
                pipeline.save(temporary / STEPS / name, dtype=dtype)

    def with_text_encoder(self, folder: str | Path) -> "Pipeline":
        """Return the same pipeline with its frozen text encoder in another folder.

        Raises:
          UserError: If the text encoder was trained with the denoiser.
        """
        text_encoder = set_encoder_folder(self.config.model.text_encoder, folder)
        return self._with_model(replace(self.config.model, text_encoder=text_encoder))

    def with_attention(self, backend: Backend) -> "Pipeline":
        """Return the same pipeline, with its weights, that computes attention by another backend.

        Raises:
          UserError: If the backend does not support the denoiser's patterns, or the devices lack its kernels.
        """
        return self._with_model(self.config.model.replace_backbone(attention=backend))

    def with_decoding(self, *, memory: int | None = None, tiles: Tiles | None = None) -> "Pipeline":
        """Return the same pipeline, with its weights, that encodes and decodes clips in other parts.

        Args:
          memory: Estimated bytes that encoding and decoding may take on a device, besides the autoencoder; by default
            8 GiB, or half of the device's memory if that is less. As many frames are coded at once as fit.
          tiles: Sizes of tiles of a picture, if not even one latent frame fits; see `Tiles` for the cost.
        """
        changed = copy.copy(self)
        changed._set_codec(LatentCodec(self.config.model.autoencoder, self.codec.params, memory=memory, tiles=tiles))
        return changed

    def with_preview_decoder(self, decoder: PreviewDecoder | None) -> "Pipeline":
        """Return the same pipeline, with its weights, with another decoder of quick previews.

        Raises:
          UserError: If the decoder is for latents of another stride or number of channels.
        """
        model = self.config.model.autoencoder
        if decoder is not None and (decoder.stride, decoder.channels) != (model.stride, model.channels):
            raise UserError(
                f"a preview decoder for stride {list(decoder.stride)} and {decoder.channels} channels is invalid: the "
                f"autoencoder has {list(model.stride)} and {model.channels}. Use one that was fitted to it"
            )
        changed = copy.copy(self)
        changed.preview_decoder = decoder
        return changed

    def _set_codec(self, codec: LatentCodec) -> None:
        self.codec = codec
        """Autoencoder with its parameters."""
        shared = self._devices.make_clip_codec(codec)
        self._decoder = ClipDecoder(codec, self.config.fps, shared, self._devices.local_count)
        self.task_model = make_task_model(self.config, codec, offload=self._offload)

    def _with_model(self, model: ModelConfig) -> "Pipeline":
        pipeline = Pipeline(
            replace(self.config, model=model),
            autoencoder=self.codec.params,
            denoiser=self._weights.params,
            previous=self._previous,
            get_lora_modules=self._get_lora_modules,
            parallel=self._parallel,
            offload=self._offload,
        )
        pipeline._set_codec(self.codec)
        pipeline.preview_decoder = self.preview_decoder
        return pipeline._with_weights(self._weights._replace(params=pipeline._weights.params))

    def _with_weights(self, weights: AdaptedWeights) -> "Pipeline":
        adapted = copy.copy(self)  # shares the open text encoder
        adapted._weights = weights
        adapted._denoiser = self._denoiser._replace(params=weights.make_sampling_params())
        return adapted

    def _prepare(self, requests: Sequence[Request], **overrides: Unpack[SamplingOverrides]) -> dict[str, Any]:
        """Return arguments of `sample_latents`; warn if guidance has no trained unconditional branch."""
        self._weights.check_usable()
        sampling, config = self.resolve_sampling(**overrides), self.config
        if sampling.full_guidance.branch_count > 1 and config.caption_dropout == 0:
            warnings.warn(
                "guidance needs an unconditional model, and this one was trained without caption dropout; use "
                "guidance=1, or train it with caption_dropout",
                stacklevel=3,
            )
        sized = [request._replace(size=config.resolve_size(request)) for request in requests]
        latent_requests = [
            prepare_request(config, request, self.task_model) for request in self._sample_previous_steps(sized)
        ]
        rows = max(1, min(config.batch, len(requests)))
        return {"requests": latent_requests, "sampling": sampling, "shape": config.model.row_shape, "rows": rows}

    def _sample_previous_steps(self, requests: Sequence[Request]) -> list[Request]:
        """Return requests, which have sizes, with the conditioning that previous steps sample, where they lack it."""
        requests = list(requests)
        for step in self.config.previous:
            pipeline = self._previous[step.name]
            own = [index for index, request in enumerate(requests) if step.name not in request.conditioning]
            if not own:
                continue
            parts = []
            for index in own:
                prompt, size, seed, negative, *_ = requests[index]
                parts.append(Request(prompt, step.get_size(to_grid(size), pipeline.config.size), seed, negative))
            values: Sequence[Any]
            values = pipeline.generate_many(parts) if step.output == "clip" else pipeline.generate_latents(parts)
            for index, value in zip(own, values, strict=True):
                conditioning = {**requests[index].conditioning, step.name: value}
                requests[index] = requests[index]._replace(conditioning=conditioning)
        return requests


def _add_options(request: Request, options: Mapping[str, Any]) -> Request:
    """Return the request of a task with options; conditions are added to its own.

    Raises:
      UserError: If the task has its own value of an option.
    """
    defaults = Request("")
    own = {name for name in request._fields if getattr(request, name) is not getattr(defaults, name)}
    if overridden := sorted(own & options.keys() - {"conditions"}):
        raise UserError(f"{overridden[0]}= is invalid: the task has its own. Leave it out, or use generate")
    conditions = (*request.conditions, *options.get("conditions", ()))
    return request._replace(**{**options, "conditions": conditions})


def _add_task(clip: Clip, task: AnyTask) -> Clip:
    """Return the result of a task, whose recipe has the task's name and its values, without its clips."""
    values = {each.name: getattr(task, each.name) for each in fields(task)}
    described: dict[str, Any] = {"name": type(task).__name__}
    for name, value in values.items():
        if name != "prompt" and isinstance(value, int | float | bool | str):
            described[name] = value
        elif name in ("size", "times") and value is not None:
            described[name] = list(value)
    return replace(clip, recipe={**clip.recipe, "clip_task": described})
