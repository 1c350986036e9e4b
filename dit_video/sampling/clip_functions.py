"""A denoiser on rows of clips, as sampling packs them: functions of it, such as a loss, and its gradients."""

import abc
import contextlib
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Key, Shaped

from dit_video.core.errors import UserError
from dit_video.core.memory import name_exhausted_memory
from dit_video.core.typing import AnyArray
from dit_video.diffusion import DenoiseFn, Prediction, Process
from dit_video.distributed.gather import to_host
from dit_video.models.backbones.denoise import adapt_prediction
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.sampling.denoiser import Denoiser, list_experts
from dit_video.sampling.packing import (
    START_LATENTS,
    PlannedBatch,
    SamplingBatch,
    SamplingRequest,
    embed_prompts,
    plan_batches,
)
from dit_video.sampling.plan import StepTransform
from dit_video.sampling.program import (
    ProgramArguments,
    init_rows_state,
    make_argument_shardings,
    make_rows_denoise,
    put_on_devices,
)
from dit_video.sampling.sampling_config import Sampling
from dit_video.tokens import LayoutShape, PackedBatch

_EXHAUSTED_MEMORY_FIX = "Use fewer rows (batch of the pipeline), a smaller size or a mesh of several devices"


class PackedLatents(NamedTuple):
    """Clips in rows, and the process and prediction of the denoiser."""

    rows: PackedBatch
    data: Float[Array, "B N p"]
    """Latents of the clips in tokens; zero in padding."""
    keys: Key[Array, "B G"]
    """Key of each clip's seed."""
    process: Process
    prediction: Prediction
    is_clean: Bool[Array, "B N"] | None
    """True for tokens that the model gets without noise, and that it does not predict; None without any."""

    def draw_noise(self, purpose: str, number: Array | int) -> Float[Array, "B N p"]:
        """Return standard normal noise, a function of each clip's seed, the purpose and a number."""

        def fold(each):
            return jax.random.fold_in(jax.random.fold_in(each, zlib.crc32(purpose.encode())), number)

        return self.rows.layout.sample_noise(jax.vmap(jax.vmap(fold))(self.keys), self.data.shape[-1])


class DenoiserParts(NamedTuple):
    """Static part of a compiled denoiser: its models without parameters, its process, and the change of its inputs."""

    backbone: nnx.GraphDef
    text: nnx.GraphDef
    process: Process
    prediction: Prediction
    boundary: float | None
    """Time below which the second of two experts denoises; None for one."""
    transform: StepTransform | None
    config: BackboneConfig

    def init_state(self, batch: SamplingBatch) -> Any:
        """Return the state of the model before the first step, a tuple of two for two experts; None if it has none."""
        state = init_rows_state(self.config, batch.branches[0])
        return state if state is None or self.boundary is None else (state, state)

    def make_denoise(self, params: Mapping[str, Any], batch: SamplingBatch) -> DenoiseFn:
        """Return the function that denoises the clips of a batch at one time, without guidance.

        Args:
          params: Parameters of the experts and of the text encoder, by the names of a pipeline's `denoiser_params`.
          batch: The batch.
        """
        rows, keys = jax.tree.map(jnp.asarray, batch.branches[0]), jax.random.wrap_key_data(jnp.asarray(batch.keys))
        context = nnx.merge(self.text, params["text"])(rows.text, rows.text_segments)

        def make(expert: str) -> DenoiseFn:
            model = nnx.merge(self.backbone, params[expert])
            return make_rows_denoise(model, context, rows, keys, self.process, self.transform)

        first, *others = map(make, list_experts(self.boundary))
        if self.boundary is None:
            return first
        boundary, (second,) = self.boundary, others

        def denoise(noisy, time, state):
            first_state, second_state = (None, None) if state is None else state

            def denoise_first():
                prediction, next_state = first(noisy, time, first_state)
                return prediction, None if state is None else (next_state, second_state)

            def denoise_second():
                prediction, next_state = second(noisy, time, second_state)
                return prediction, None if state is None else (first_state, next_state)

            return jax.lax.cond(time >= boundary, denoise_first, denoise_second)

        return denoise

    def make_clips(self, batch: SamplingBatch) -> PackedLatents:
        """Return the clips of a batch."""
        rows = jax.tree.map(jnp.asarray, batch.branches[0])
        return PackedLatents(
            rows=rows,
            data=rows.fields[START_LATENTS],
            keys=jax.random.wrap_key_data(jnp.asarray(batch.keys)),
            process=self.process,
            prediction=adapt_prediction(self.prediction, rows.layout),
            is_clean=None if self.transform is None else self.transform.get_clean_tokens(rows),
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=("batch", "rows", "slots"), meta_fields=("parts",))
@dataclass(frozen=True, kw_only=True)
class OpenDenoiser:
    """The denoiser of a pipeline for some clips, packed in rows: preferences, caches and steering begin here.

    It is a pytree: a jitted function takes it as an argument, and is compiled once for rows of a shape.
    """

    parts: DenoiserParts
    batch: SamplingBatch
    rows: Int[AnyArray, " clips"]
    """Row of each clip."""
    slots: Int[AnyArray, " clips"]
    """Number of each clip in its row."""

    @property
    def clips(self) -> PackedLatents:
        """Return the clips in rows, with their latents, and noise by their seeds."""
        return self.parts.make_clips(self.batch)

    def init_state(self) -> Any:
        """Return the state of the model before its first step, which each of two experts has; None for one without."""
        return self.parts.init_state(self.batch)

    def denoise(
        self, params: Mapping[str, Any], noisy: Float[Array, "B N p"], time: Float[Array, ""] | float, state: Any = None
    ) -> tuple[Float[Array, "B N prediction"], Any]:
        """Return the model's prediction at one time, differentiable in `params`, and the next state.

        Args:
          params: The parameters, as `Pipeline.denoiser_params`.
          noisy: Noisy tokens.
          time: Diffusion time.
          state: State of the model, as `init_state` begins it; None for one without, and where no earlier step is
            known, as in training.
        """
        return self.parts.make_denoise(params, self.batch)(noisy, jnp.asarray(time), state)

    def unpack(self, values: Shaped[Array, "B G *rest"]) -> Shaped[Array, "clips *rest"]:
        """Return the values of each clip from those of all segments, in the order of the requests."""
        return values[self.rows, self.slots]

    def average(self, values: Float[Array, "B N p"]) -> Float[Array, " clips"]:
        """Return the mean of each clip's values."""
        return self.unpack(self.clips.rows.layout.mean(values.mean(axis=-1)))


class ClipFunction(abc.ABC):
    """A function of a denoiser and clips, as a frozen dataclass: it is a part of the compiled program."""

    @abc.abstractmethod
    def __call__(self, denoise: DenoiseFn, clips: PackedLatents) -> Float[Array, "values B G"]:
        """Return the values of every clip, in their segments.

        Args:
          denoise: The model; it gets the time as a scalar.
          clips: The clips.
        """


def compute_clip_function(
    function: ClipFunction,
    denoiser: Denoiser,
    requests: Sequence[SamplingRequest],
    *,
    sampling: Sampling,
    shape: LayoutShape,
    rows: int,
) -> Float32[np.ndarray, "clips values"]:
    """Return the values of a function for every clip. The values of a clip do not depend on the other clips.

    Args:
      function: The function.
      denoiser: The trained denoiser. Two experts are both on the devices.
      requests: Prompts, seeds and conditioning of the clips, whose latents are the plans' `start`.
      sampling: Sampling without guidance.
      shape: Shape of a row.
      rows: Number of rows that are computed at a time.

    Raises:
      UserError: If `sample_latents` would refuse the requests.
    """
    results: dict[int, Float32[np.ndarray, " values"]] = {}
    texts = embed_prompts(denoiser, requests, sampling)
    with name_exhausted_memory("measuring", _EXHAUSTED_MEMORY_FIX), contextlib.ExitStack() as stack:
        experts = [stack.enter_context(denoiser.open_params(expert)) for expert in denoiser.experts]
        params = {name: each["backbone"] for name, each in zip(denoiser.experts, experts, strict=True)}
        params["text"] = experts[0]["text"]
        for planned in plan_batches(denoiser, requests, texts, sampling, shape, rows):
            program = _compile(_get_parts(denoiser, planned), function)
            values = np.asarray(to_host(program(params, _put_batch(denoiser, planned))), np.float32)
            for row, members in enumerate(planned.row_requests):
                results |= {index: values[:, row, slot] for slot, index in enumerate(members)}
    return np.stack([results[index] for index in range(len(requests))])


def open_denoiser(
    denoiser: Denoiser,
    requests: Sequence[SamplingRequest],
    *,
    sampling: Sampling,
    shape: LayoutShape,
    rows: int,
) -> OpenDenoiser:
    """Return the denoiser for the clips of requests; arguments and errors are as for `compute_clip_function`.

    Raises:
      UserError: If the clips do not fit into rows of one batch.
    """
    texts = embed_prompts(denoiser, requests, sampling)
    planned, *others = plan_batches(denoiser, requests, texts, sampling, shape, rows)
    if others:
        sizes = ", ".join(sorted({"x".join(map(str, request.noise.shape[:3])) for request in requests}))
        raise UserError(
            f"latents of {sizes} are invalid: rows of several shapes would be needed, or times differ. Use clips of "
            "one size, or open them one size at a time."
        )
    if (count := len(planned.row_requests)) < rows:  # The clips share rows: the others would be empty.
        (planned,) = plan_batches(denoiser, requests, texts, sampling, shape, count)
    places = {
        index: (row, slot) for row, members in enumerate(planned.row_requests) for slot, index in enumerate(members)
    }
    row_numbers, slots = np.asarray([places[index] for index in range(len(requests))], np.int32).T
    return OpenDenoiser(
        parts=_get_parts(denoiser, planned), batch=_put_batch(denoiser, planned), rows=row_numbers, slots=slots
    )


def _get_parts(denoiser: Denoiser, planned: PlannedBatch) -> DenoiserParts:
    kinds = denoiser.backbone, denoiser.text, denoiser.process, denoiser.prediction, denoiser.boundary
    return DenoiserParts(*kinds, planned.transform, denoiser.config)


def _put_batch(denoiser: Denoiser, planned: PlannedBatch) -> SamplingBatch:
    if denoiser.mesh is None:
        return planned.batch
    arguments = ProgramArguments({}, None, planned.batch, None, planned.sample_times, np.int32(0))
    return put_on_devices(planned.batch, make_argument_shardings(arguments, denoiser.mesh).batch)


@functools.lru_cache(maxsize=16)
def _compile(parts: DenoiserParts, function: ClipFunction) -> Callable[[Any, SamplingBatch], Array]:
    """Return the jitted `run(params, batch)`, which is compiled once per shape of rows."""

    @jax.jit
    def run(params, batch: SamplingBatch):
        return function(parts.make_denoise(params, batch), parts.make_clips(batch))

    return run
