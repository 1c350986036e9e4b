"""Pipeline of a trained model: prompts in, clips out.

A pipeline folder holds `pipeline.json` (the configs), `autoencoder.safetensors` and `denoiser.safetensors`: no pickle,
and nothing of the training state.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from dit_video.core.errors import UserError, check_number
from dit_video.core.files import atomic_path
from dit_video.core.memory import name_exhausted_memory
from dit_video.core.offload import Offload
from dit_video.core.trees import count_values as count
from dit_video.core.trees import flatten, unflatten
from dit_video.data.latents.codec import LatentCodec, compute_autoencoder_identity
from dit_video.diffusion import Euler, Guidance, Solver
from dit_video.distributed import Parallelism
from dit_video.distributed.gather import gather_parts, is_first_process
from dit_video.models.autoencoders import Tiles
from dit_video.nn import Backend
from dit_video.sampling import LatentTrace, Monitor, Sampling, sample_latents, trace_latents
from dit_video.sampling.adapters import AdaptedWeights, Adapter, ExpertName, list_lora_modules, split_factors
from dit_video.sampling.clip_functions import (
    ClipFunction,
    OpenDenoiser,
    compute_clip_function,
    open_denoiser,
)
from dit_video.sampling.clip_recipe import describe_config, make_recipe
from dit_video.sampling.devices import ClipDecoder, PipelineDevices, SampledLatents
from dit_video.sampling.edit_paths import LatentStepper
from dit_video.sampling.pictures import Image, MaskImage, Video
from dit_video.sampling.pipeline_config import (
    AUTOENCODER,
    CONFIG,
    DENOISER,
    PREVIEW,
    STEPS,
    PipelineConfig,
    PreviousStep,
    make_denoiser,
    make_model_parts,
    write_pipeline_config,
)
from dit_video.sampling.preparation import check_sampling, get_dropouts, prepare_request, select_conditioning
from dit_video.sampling.preview import PreviewDecoder
from dit_video.sampling.progress import Callback, make_report
from dit_video.sampling.request import (
    Condition,
    Conditioner,
    Method,
    OneOrMany,
    Prompts,
    Request,
    Size,
    Strengths,
    check_request_list,
    make_requests,
)
from dit_video.sampling.sampling_config import GuidanceScale, check_is_sampling
from dit_video.sampling.tasks import Task, get_task_name
from dit_video.sampling.tasks.task import add_options, describe_task, list_tasks
from dit_video.video import Clip
from dit_video.weights import load_lora
from dit_video.weights import save as save_weights
from dit_video.weights.frozen_encoders import open_tokenizer, set_encoder_folder
from dit_video.weights.lora import GetLoraModules, no_lora_modules

StepOptions = Mapping[str, Mapping[str, Any]]
"""Arguments of `Pipeline.make_sampling` for previous steps, by the names of the steps."""
_DTYPES = ("float32", "bfloat16")
_DECODING_FIX = "Use with_decoding(memory=...) (--decode-memory) with less, or tiles of the frames (--decode-tiles)"


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
        parallel: Parallelism | None = None,
        offload: Offload | None = None,
        folder: Path = Path(),
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
          folder: Folder of its run, or its own, that files of conditioning are relative to.

        Raises:
          UserError: If the previous steps are not the config's, `parallel` does not fit the devices or the denoiser, or
            the devices lack the kernels of the attention.
        """
        self.config = config
        self._parallel, self._offload, self._folder = parallel, offload, folder
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

    # fmt: off
    @overload
    def generate(
        self, prompt: str | int, *, size: Size | None = ..., seed: int = ..., negative: str | None = ...,
        image: Image | None = ..., last_image: Image | None = ..., video: Video | None = ...,
        generated: MaskImage | None = ..., strength: float | None = ..., conditions: Sequence[Condition] = ...,
        control: Video | None = ..., reference_images: Sequence[Image] = ..., method: Method = ..., resample: int = ...,
        conditioning: Mapping[str, Any] | None = ..., strengths: Strengths | None = ...,
        noise: Float32[np.ndarray, "t h w c"] | None = ..., conditioner: Conditioner | None = ...,
        steps: int | None = ..., guidance: GuidanceScale | None = ..., solver: str | Solver | None = ...,
        shift: float | None = ..., times: Sequence[float] | None = ..., previous: StepOptions | None = ...,
        sampling: Sampling | None = ..., callback: Callback | None = ...,
    ) -> Clip: ...

    @overload
    def generate(
        self, prompt: Prompts, *, size: OneOrMany[Size | None] = ..., seed: OneOrMany[int] = ...,
        negative: OneOrMany[str | None] = ..., image: OneOrMany[Image | None] = ...,
        last_image: OneOrMany[Image | None] = ..., video: OneOrMany[Video | None] = ...,
        generated: OneOrMany[MaskImage | None] = ..., strength: OneOrMany[float | None] = ...,
        conditions: OneOrMany[Sequence[Condition]] = ..., control: OneOrMany[Video | None] = ...,
        reference_images: OneOrMany[Sequence[Image]] = ..., method: Method = ..., resample: int = ...,
        conditioning: OneOrMany[Mapping[str, Any] | None] = ..., strengths: OneOrMany[Strengths | None] = ...,
        noise: OneOrMany[Float32[np.ndarray, "t h w c"] | None] = ..., conditioner: Conditioner | None = ...,
        steps: int | None = ..., guidance: GuidanceScale | None = ..., solver: str | Solver | None = ...,
        shift: float | None = ..., times: Sequence[float] | None = ..., previous: StepOptions | None = ...,
        sampling: Sampling | None = ..., callback: Callback | None = ...,
    ) -> list[Clip]: ...
    # fmt: on

    def generate(
        self,
        prompt: str | int | Prompts,
        *,
        size: OneOrMany[Size | None] = None,
        seed: OneOrMany[int] = 0,
        negative: OneOrMany[str | None] = None,
        image: OneOrMany[Image | None] = None,
        last_image: OneOrMany[Image | None] = None,
        video: OneOrMany[Video | None] = None,
        generated: OneOrMany[MaskImage | None] = None,
        strength: OneOrMany[float | None] = None,
        conditions: OneOrMany[Sequence[Condition]] = (),
        control: OneOrMany[Video | None] = None,
        reference_images: OneOrMany[Sequence[Image]] = (),
        method: Method = "auto",
        resample: int = 1,
        conditioning: OneOrMany[Mapping[str, Any] | None] = None,
        strengths: OneOrMany[Strengths | None] = None,
        noise: OneOrMany[Float32[np.ndarray, "t h w c"] | None] = None,
        conditioner: Conditioner | None = None,
        steps: int | None = None,
        guidance: GuidanceScale | None = None,
        solver: str | Solver | None = None,
        shift: float | None = None,
        times: Sequence[float] | None = None,
        previous: StepOptions | None = None,
        sampling: Sampling | None = None,
        callback: Callback | None = None,
    ) -> Clip | list[Clip]:
        """Generate a clip from a prompt, or a list of clips from a list of prompts, packed and sampled together.

        With a list of prompts, an argument of a request is one for all, or a list with one for each prompt. Images,
        videos and masks are clips, arrays, PIL images or files: see `dit_video.sampling.pictures`. None takes the
        pipeline's own value.

        Args:
          prompt: Content of the clip; an empty one samples without a condition. In a model of classes also the name or
            the number of one.
          size: Frames, height and width in pixels; the training size by default, with the aspect ratio of an image if
            there is one. Frames are 1 + k * temporal stride.
          seed: Random seed; the same seed, size and model give the same clip.
          negative: Negative prompt, which replaces the empty prompt (or no class) in guidance; the model's own by
            default (`config.negative`), none if empty.
          image: First frame (Wan's I2V needs it). All pictures are fitted to the size: scaled to cover it, and cropped
            on both sides alike.
          last_image: Last frame.
          video: Clip that is kept where `generated` is False, or that `strength` changes.
          generated: Mask of `video`, `[T H W]`, `[H W]` for all frames or `[T]` for whole frames: True where pixels are
            generated.
          strength: Diffusion time, in (0, 1], that `video` is noised to and sampling starts at.
          conditions: Images and clips at some frames, each a `Condition`.
          control: Clip that steers what is generated (poses, depth, edges), in models that accept one.
          reference_images: Images of subjects that the clip shows, in models that accept them.
          method: Way to keep known pixels: `trained`, `training_free`, or `auto`: as trained where the model was, and
            without training elsewhere; see `docs/tasks.md`.
          resample: Number of times that training-free sampling takes every part of the steps.
          conditioning: Values of further conditioning that the model was trained with, by name. Values that previous
            steps sample may be left out; those that their models know are theirs, too.
          strengths: Strengths of further conditioning, by name; 1 by default.
          noise: Initial noise `[t h w c]` of the latents' size, standard normal, instead of the seed's.
          conditioner: A `Conditioner` other than the model's own.
          steps: Number of sampling steps; more are slower and closer to the exact flow.
          guidance: Guidance scale, which trades variety for prompt following; 1 is none. Two numbers are for two
            experts, noisy times first. A mapping such as `{"text": 5, "image": 2}` has scales of other conditions, too,
            and `Guidance` a method, an interval and rescaling besides.
          solver: A name in `dit_video.diffusion.SOLVERS`, or a solver. Noise that it draws depends on the seed.
          shift: Shift of the times towards noise, instead of that of training.
          times: Falling times at which the steps start, in (0, 1]; the last step leads to 0. With `shift` they are
            shifted by it, otherwise they are taken as they are.
          previous: Sampling of previous steps by their names: `{"prior": {"steps": 25, "guidance": 4.0}}`.
          sampling: Sampling that `steps`, `guidance`, `solver`, `shift`, `times` and `previous` change.
          callback: Called with a `PipelineProgress` after every few steps; what it raises ends the sampling.

        Raises:
          TypeError: If a prompt is neither a text nor the number of a class.
          UserError: If the size is not supported (the message names the nearest), the class or the solver is unknown,
            `steps` is below 1, the shift or the times are invalid, the seed is not a whole number below 2**32, the
            noise has another shape, a list is not as long as that of the prompts, pictures do not fit the size or the
            model, or values become NaN or infinite.
        """
        requests = make_requests(
            prompt,
            has_classes=self.config.model.backbone.classes > 0,
            method=method,
            resample=resample,
            conditioner=conditioner,
            size=size,
            seed=seed,
            negative=negative,
            image=image,
            last_image=last_image,
            video=video,
            generated=generated,
            strength=strength,
            conditions=conditions,
            control=control,
            reference_images=reference_images,
            conditioning=conditioning,
            strengths=strengths,
            noise=noise,
        )
        sampling = self.make_sampling(
            sampling, steps=steps, guidance=guidance, solver=solver, shift=shift, times=times, previous=previous
        )
        clips = self.generate_many(requests, sampling=sampling, callback=callback)
        return clips if isinstance(prompt, list | tuple) else clips[0]

    def make_sampling(
        self,
        sampling: Sampling | None = None,
        *,
        steps: int | None = None,
        guidance: GuidanceScale | None = None,
        solver: str | Solver | None = None,
        shift: float | None = None,
        times: Sequence[float] | None = None,
        previous: StepOptions | None = None,
    ) -> Sampling:
        """Return a sampling, by default the pipeline's own, with the given values replaced; see `Sampling.change`.

        `previous` has the values of previous steps, by the names of the steps, each as arguments of this method.

        Raises:
          UserError: If `Sampling.change` refuses the values, the model cannot sample so, or a step does not exist.
        """
        check_is_sampling(sampling)
        changed = (sampling or self.config.sampling).change(
            self.config.model.process, steps=steps, guidance=guidance, solver=solver, shift=shift, times=times
        )
        if previous is not None and not (
            isinstance(previous, Mapping) and all(isinstance(values, Mapping) for values in previous.values())
        ):
            rule = "it must be a mapping of previous steps to mappings of their values"
            raise UserError(f"previous={previous!r} is invalid: {rule}. Use {{'prior': {{'steps': 25}}}}.")
        if previous:
            steps_before = dict(changed.previous or {})
            for name, values in previous.items():
                own = steps_before.get(name) or self.config.get_previous_step(name).sampling
                steps_before[name] = self._previous[name].make_sampling(own, **values)
            changed = replace(changed, previous=steps_before)
        check_sampling(self.config, changed)
        return changed

    def generate_many(
        self, requests: Sequence[Request], *, sampling: Sampling | None = None, callback: Callback | None = None
    ) -> list[Clip]:
        """Generate the clips of all requests, of any sizes, packed and sampled together.

        A request has its own images, in models that accept them: `Request(prompt, size, image=pixels)`. `sampling` is
        the pipeline's own by default (see `make_sampling`); `callback` and errors are as for `generate`.
        """
        check_request_list(requests)
        self.check_decoding(requests)
        return self.decode_many(self.sample_many(requests, sampling=sampling, callback=callback))

    def generate_latents(
        self, requests: Sequence[Request], *, sampling: Sampling | None = None, callback: Callback | None = None
    ) -> list[Float32[np.ndarray, "_ _ _ c"]]:
        """Generate normalised latents `t h w c` of all requests; arguments and errors are as for `generate_many`.

        On a mesh of several processes all of them call this, and all get the latents.
        """
        return [each.latents for each in self.sample_many(requests, sampling=sampling, callback=callback)]

    def sample_many(
        self, requests: Sequence[Request], *, sampling: Sampling | None = None, callback: Callback | None = None
    ) -> list[SampledLatents]:
        """Generate latents with their requests and recipes, for `decode_many`; see `generate_latents`."""
        prepared = self._prepare(requests, sampling)
        # `check_decoding` knows no plans, and so not that more is decoded than is sampled.
        self._decoder.check_memory([each.decoded_grid for each in prepared["requests"] if each.plan.decoding])
        latents = sample_latents(self._denoiser, **prepared, monitor=self.make_monitor(callback))
        sampled = []
        for request, values, planned in zip(requests, latents, prepared["requests"], strict=True):
            sized = replace(request, size=self.config.resolve_size(request))
            recipe = make_recipe(self.config, sized, planned.plan, prepared["sampling"])
            sampled.append(SampledLatents(values, sized, recipe, planned.plan.decoding, planned.plan.finish))
        return sampled

    def trace(self, request: Request, *, sampling: Sampling | None = None) -> LatentTrace:
        """Sample one request and return the latents and the predicted clean latents after every step.

        `decode` makes a clip of latents. Arguments and errors are as for `generate_many`.
        """
        return trace_latents(self._denoiser, **self._prepare([request], sampling))[0]

    # fmt: off
    @overload
    def run(
        self, task: Task, *, seed: int = ..., negative: str | None = ..., conditions: Sequence[Condition] = ...,
        control: Video | None = ..., reference_images: Sequence[Image] = ..., method: Method = ..., resample: int = ...,
        conditioning: Mapping[str, Any] | None = ..., strengths: Strengths | None = ...,
        steps: int | None = ..., guidance: GuidanceScale | None = ..., solver: str | Solver | None = ...,
        shift: float | None = ..., times: Sequence[float] | None = ..., previous: StepOptions | None = ...,
        sampling: Sampling | None = ..., callback: Callback | None = ...,
    ) -> Clip: ...

    @overload
    def run(
        self, task: Iterable[Task], *, seed: OneOrMany[int] = ..., negative: OneOrMany[str | None] = ...,
        conditions: OneOrMany[Sequence[Condition]] = ..., control: OneOrMany[Video | None] = ...,
        reference_images: OneOrMany[Sequence[Image]] = ..., method: Method = ..., resample: int = ...,
        conditioning: OneOrMany[Mapping[str, Any] | None] = ..., strengths: OneOrMany[Strengths | None] = ...,
        steps: int | None = ..., guidance: GuidanceScale | None = ..., solver: str | Solver | None = ...,
        shift: float | None = ..., times: Sequence[float] | None = ..., previous: StepOptions | None = ...,
        sampling: Sampling | None = ..., callback: Callback | None = ...,
    ) -> list[Clip]: ...
    # fmt: on

    def run(
        self,
        task: Task | Iterable[Task],
        *,
        seed: OneOrMany[int] = 0,
        negative: OneOrMany[str | None] = None,
        conditions: OneOrMany[Sequence[Condition]] = (),
        control: OneOrMany[Video | None] = None,
        reference_images: OneOrMany[Sequence[Image]] = (),
        method: Method = "auto",
        resample: int = 1,
        conditioning: OneOrMany[Mapping[str, Any] | None] = None,
        strengths: OneOrMany[Strengths | None] = None,
        steps: int | None = None,
        guidance: GuidanceScale | None = None,
        solver: str | Solver | None = None,
        shift: float | None = None,
        times: Sequence[float] | None = None,
        previous: StepOptions | None = None,
        sampling: Sampling | None = None,
        callback: Callback | None = None,
    ) -> Clip | list[Clip]:
        """Run a task, such as `Extend(clip, frames=16)`, or a list of tasks on clips of any sizes.

        Tasks of one request are packed and sampled together; those of several passes follow one after the other.

        Args:
          task: The task or tasks.
          seed: Random seed; for a list of tasks this and the options below are one for all, or a list with one each.
          negative: Negative prompt; the model's own by default.
          conditions: Further images and clips at some frames of the sampled clip.
          control: Clip that steers what is generated, in models that accept one.
          reference_images: Images of subjects that the clip shows, in models that accept them.
          method: Way to keep known pixels, as for `generate`.
          resample: Number of times that training-free sampling takes every part of the steps.
          conditioning: Values of further conditioning by name.
          strengths: Strengths of further conditioning by name.
          steps: As for `generate`; so are the arguments that follow.
          guidance: Guidance, or its scales.
          solver: Solver or its name.
          shift: Shift of the times towards noise.
          times: Times at which the steps start.
          previous: Sampling of previous steps by their names.
          sampling: Sampling that the others change; the pipeline's own by default.
          callback: Called with a `PipelineProgress` after every few steps.

        Raises:
          UserError: If a task does not fit the model or an option, or `generate` would refuse an option.
        """
        tasks = list_tasks(task)
        options = make_requests(
            "" if isinstance(task, Task) else [""] * len(tasks),
            has_classes=False,
            method=method,
            resample=resample,
            conditioner=None,
            seed=seed,
            negative=negative,
            conditions=conditions,
            control=control,
            reference_images=reference_images,
            conditioning=conditioning,
            strengths=strengths,
        )
        sampling = self.make_sampling(
            sampling, steps=steps, guidance=guidance, solver=solver, shift=shift, times=times, previous=previous
        )
        clips = self.run_many(tasks, options, sampling=sampling, callback=callback)
        return clips[0] if isinstance(task, Task) else clips

    def run_many(
        self,
        tasks: Sequence[Task],
        options: Sequence[Request],
        *,
        sampling: Sampling | None = None,
        callback: Callback | None = None,
    ) -> list[Clip]:
        """Run tasks, each with its options, as `run` does.

        Args:
          tasks: The tasks.
          options: For each task a request without a prompt and size, with its seed and what else `run` takes.
          sampling: Steps, solver and guidance; the pipeline's own by default.
          callback: Called with a `PipelineProgress` after every few steps.
        """
        sampling, fitted = sampling or self.config.sampling, [task.fit(self.config) for task in tasks]
        requests = {
            number: add_options(request, own)
            for number, (task, own) in enumerate(zip(fitted, options, strict=True))
            if (request := task.make_request(self.config)) is not None
        }
        sampled = self.generate_many(list(requests.values()), sampling=sampling, callback=callback)
        results = dict(zip(requests, sampled, strict=True))
        clips = []
        for number, (task, own) in enumerate(zip(tasks, options, strict=True)):
            if number in results:
                clip = fitted[number].finish(results[number])
            else:
                clip = fitted[number].run(self, own, sampling=sampling, callback=callback)
            described = {"name": get_task_name(task), **describe_task(task)}
            clips.append(replace(clip, recipe={**clip.recipe, "task": described}))
        return clips

    def make_stepper(self, request: Request, *, sampling: Sampling | None = None) -> LatentStepper:
        """Return the denoiser and Euler's solver for the latents of a request, at any times of its steps.

        Arguments and errors are as for `generate_many`.
        """
        prepared = self._prepare([request], sampling)
        sampling = replace(prepared["sampling"], solver=Euler())
        (single,) = prepared["requests"]
        return LatentStepper(self._denoiser, single, sampling=sampling, shape=prepared["shape"])

    def make_monitor(self, callback: Callback | None) -> Monitor | None:
        """Return the sampler's monitor that calls a callback with the progress; None without one."""
        report = make_report(callback, self.decode, preview_decoder=self.preview_decoder, fps=self.config.fps)
        return None if report is None else Monitor(report)

    def compute_clip_function(
        self,
        function: ClipFunction,
        requests: Sequence[Request],
        latents: Sequence[Float32[np.ndarray, "_ _ _ c"]],
    ) -> Float32[np.ndarray, "clips values"]:
        """Return the values of a function of the denoiser, such as a loss, for the latents of clips, packed together.

        A request has the prompt, the size and what else is known of its clip, and the seed of the function's noise. On
        a mesh of several processes all of them call this, with the same clips.

        Raises:
          UserError: If there is not one array of latents, of the request's size, for each request, latents are not
            finite, or `generate_many` would refuse the requests.
        """
        return compute_clip_function(function, self._denoiser, **self._prepare_clips(requests, latents))

    def open_denoiser(
        self, requests: Sequence[Request], latents: Sequence[Float32[np.ndarray, "_ _ _ c"]]
    ) -> OpenDenoiser:
        """Return the denoiser as a function of its parameters and of noisy tokens, for the clips of requests.

            opened = pipe.open_denoiser(requests, [pipe.encode(clip) for clip in clips])
            prediction, _ = opened.denoise(pipe.denoiser_params, noisy, time)

        Arguments and errors are as for `compute_clip_function`; all clips have to fit into rows of one shape.
        """
        prepared = self._prepare_clips(requests, latents)
        return open_denoiser(self._denoiser, **prepared | {"rows": len(requests)})

    def _prepare_clips(
        self, requests: Sequence[Request], latents: Sequence[Float32[np.ndarray, "_ _ _ c"]]
    ) -> dict[str, Any]:
        """Return arguments of functions of the denoiser and of the latents of clips.

        Raises:
          UserError: If there is no request, or not one array of finite latents, of the request's size, for each.
        """
        if not requests or len(latents) != len(requests):
            rule = f"they are of {len(latents)} clips, and there must be one for each of one or more requests"
            raise UserError(f"latents are invalid: {rule}, of which these are {len(requests)}. Use pipe.encode(clip).")
        prepared = self._prepare(requests, replace(self.config.sampling, guidance=Guidance(scales={})))
        starts = list(zip(prepared["requests"], latents, strict=True))
        for number, (each, start) in enumerate(starts):
            if np.shape(start) != each.noise.shape or not np.isfinite(start).all():
                found = f"{type(start).__name__} of shape {list(np.shape(start))}"
                rule = f"it must be an array [t h w c] of shape {list(each.noise.shape)} without NaN and infinity"
                raise UserError(f"latents[{number}] ({found}) is invalid: {rule}. Use pipe.encode(clip).")
        prepared["requests"] = [each._replace(plan=each.plan._replace(start=start)) for each, start in starts]
        return prepared

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

    def decode_many(self, samples: Sequence[SampledLatents]) -> list[Clip]:
        """Decode sampled latents to clips with their recipes: those of one size together, so that a size compiles once.

        On a mesh, this process's devices share the clips of a size.
        """
        with name_exhausted_memory("decoding", _DECODING_FIX):
            return self._decoder(samples)

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

        Requests that give a value of this conditioning skip the step. It is sampled for the request's prompts and seed,
        with the conditioning and strengths that its model knows, in its own steps and guidance; `generate` has others
        in `previous`. `save` writes all steps to one folder.

        Raises:
          UserError: If this model has no conditioning of the name.
        """
        step.check(self.config.model)
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
            there is a name for an adapter that is merged, or the scale is no number.
        """
        weights = self._weights
        weights.check_usable()
        check_number(scale=scale)
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

    def __repr__(self) -> str:
        """Return the parts, one on each line, with their numbers of parameters and dtypes."""
        config, kinds = (
            self.config,
            {"text": self.config.model.text_encoder, "autoencoder": self.config.model.autoencoder},
        )
        parts = {"autoencoder": self.codec.params, **self._weights.params}
        size = config.size
        lines = [f"Pipeline: {size.t} frames of {size.w}x{size.h} pixels, {config.fps:g} per second"]
        for name, params in parts.items():
            kind = type(kinds.get(name, config.model.backbone)).__name__
            dtypes = (
                ", ".join(sorted({str(leaf.dtype) for leaf in flatten(params).values()})) or "no weights of its own"
            )
            lines.append(f"  {name}: {kind}, {count(params):,} parameters, {dtypes}")
        lines += [f"  adapter {name}: scale {scale:g}" for name, scale in self.lora_scales.items()]
        lines += [
            f"  step before {name}: {pipeline!r}".replace("\n", "\n  ") for name, pipeline in self._previous.items()
        ]
        return "\n".join(lines)

    def count_parameters(self) -> dict[str, int]:
        """Return the number of parameters of each part; one of a previous step has the step's name in front."""
        own = {"autoencoder": self.codec.count_parameters()}
        own |= {name: count(part) for name, part in self._weights.params.items()}
        for step, pipeline in self._previous.items():
            own |= {f"{step}/{name}": number for name, number in pipeline.count_parameters().items()}
        return own

    def compute_digest(self) -> str:
        """Return a hash of some values of every array, which tells the denoiser's weights and adapters from others."""
        previous = (pipeline.compute_digest() for pipeline in self._previous.values())
        return "-".join((self._weights.compute_digest(), *previous))

    def describe_models(self) -> dict[str, Any]:
        """Return the model's config, a hash of its autoencoder, and those of previous steps, as JSON values."""
        model = self.config.model
        return {
            "config": describe_config(model),
            "autoencoder": compute_autoencoder_identity(model.autoencoder, self.codec.params),
            "previous": {name: pipeline.describe_models() for name, pipeline in self._previous.items()},
        }

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
        return self.replace(config=self.config.replace_model(text_encoder=text_encoder))

    def with_attention(self, backend: Backend) -> "Pipeline":
        """Return the same pipeline, with its weights, that computes attention by another backend.

        Raises:
          UserError: If the backend does not support the denoiser's patterns, or the devices lack its kernels.
        """
        return self.replace(config=replace(self.config, model=self.config.model.replace_backbone(attention=backend)))

    def replace(self, *, config: PipelineConfig | None = None, denoiser: Mapping[str, Any] | None = None) -> "Pipeline":
        """Return the same pipeline with another config, such as its backbone's, or with other weights of its denoiser.

        Args:
          config: The config; its autoencoder and previous steps are this pipeline's. None to keep this one's.
          denoiser: Parameters of the parts that change: `backbone`, `low_noise` (of a second expert) or `text`; all
            adapters are left out. None to keep the weights and their adapters.

        Raises:
          UserError: If the denoiser has no such part, does not fit the devices, or they lack the kernels of the
            attention.
        """
        if unknown := sorted({*(denoiser or {})} - self._weights.params.keys()):
            parts = ", ".join(self._weights.params)
            raise UserError(f"denoiser has {unknown[0]!r}, which is no part of it. Use {parts}.")
        replaced = Pipeline(
            config or self.config,
            autoencoder=self.codec.params,
            denoiser={**self._weights.params, **(denoiser or {})},
            previous=self._previous,
            get_lora_modules=self._get_lora_modules,
            parallel=self._parallel,
            offload=self._offload,
            folder=self._folder,
        )
        replaced._set_codec(self.codec)
        replaced.preview_decoder = self.preview_decoder
        if denoiser is not None:
            return replaced
        return replaced._with_weights(self._weights._replace(params=replaced._weights.params))

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
        self.model_parts = make_model_parts(self.config, codec, offload=self._offload, folder=self._folder)

    def _with_weights(self, weights: AdaptedWeights) -> "Pipeline":
        adapted = copy.copy(self)  # shares the open text encoder
        adapted._weights = weights
        adapted._denoiser = self._denoiser._replace(params=weights.make_sampling_params())
        return adapted

    def _prepare(self, requests: Sequence[Request], sampling: Sampling | None) -> dict[str, Any]:
        """Return arguments of `sample_latents`; warn if guidance drops a condition that training never dropped."""
        self._weights.check_usable()
        check_request_list(requests)
        check_is_sampling(sampling)
        config, sampling = self.config, sampling or self.config.sampling
        check_sampling(config, sampling)
        dropouts = get_dropouts(config)
        if undropped := [name for name in sampling.guidance.dropped if dropouts[name] == 0]:
            warnings.warn(
                f"guidance drops {', '.join(undropped)}, and this model was trained without such dropout; use a scale "
                "of 1, or train it with dropout",
                stacklevel=3,
            )
        sized = [replace(request, size=config.resolve_size(request)) for request in requests]
        latent_requests = [
            prepare_request(config, request, self.model_parts)
            for request in self._sample_previous_steps(sized, sampling)
        ]
        rows = max(1, min(config.batch, len(requests)))
        return {"requests": latent_requests, "sampling": sampling, "shape": config.model.row_shape, "rows": rows}

    def _list_conditioning(self) -> frozenset[str]:
        """Return the names of the conditioning that this model, or the model of a previous step, knows."""
        own = (each.field.name for each in self.config.model.backbone.conditioning)
        return frozenset(own).union(*(each._list_conditioning() for each in self._previous.values()))

    def _sample_previous_steps(self, requests: Sequence[Request], sampling: Sampling) -> list[Request]:
        """Return requests, which have sizes, with the conditioning that previous steps sample, where they lack it.

        A step has the conditioning and strengths that its pipeline knows, and those that steps before it have sampled.
        What only steps know is no longer part of the requests.
        """
        requests, taken = list(requests), [frozenset[str]()] * len(requests)
        for step in self.config.previous:
            pipeline = self._previous[step.name]
            own = [index for index, request in enumerate(requests) if step.name not in request.conditioning]
            if not own:
                continue
            names, parts = pipeline._list_conditioning(), []
            for request in (requests[index] for index in own):
                size, given = step.get_size(request.grid, pipeline.config.size), select_conditioning(request, names)
                part = Request(request.prompt, size, request.seed, request.negative)
                parts.append(replace(part, conditioning=given.conditioning, strengths=given.strengths))
            chosen = (sampling.previous or {}).get(step.name) or step.sampling
            values: Sequence[Any]
            try:
                if step.output == "clip":
                    values = pipeline.generate_many(parts, sampling=chosen)
                else:
                    values = pipeline.generate_latents(parts, sampling=chosen)
            except UserError as error:
                raise UserError(f"previous step {step.name}: {error}") from error
            for index, value in zip(own, values, strict=True):
                conditioning = {**requests[index].conditioning, step.name: value}
                requests[index] = replace(requests[index], conditioning=conditioning)
                taken[index] |= names
        known = {each.field.name for each in self.config.model.backbone.conditioning}
        return [
            select_conditioning(request, {*request.conditioning, *request.strengths} - (names - known))
            for request, names in zip(requests, taken, strict=True)
        ]
