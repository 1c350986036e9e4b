"""Functions of a denoiser and the latents of clips, such as a loss or a likelihood, on the rows that sampling packs."""

import abc
import contextlib
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Key

from dit_video.core.memory import name_exhausted_memory
from dit_video.diffusion import DenoiseFn, Prediction, Process
from dit_video.distributed.gather import to_host
from dit_video.sampling.denoiser import Denoiser
from dit_video.sampling.packing import (
    START_LATENTS,
    SamplingBatch,
    SamplingRequest,
    embed_prompts,
    plan_batches,
)
from dit_video.sampling.plan import StepTransform
from dit_video.sampling.program import ProgramArguments, make_argument_shardings, make_rows_denoise, put_on_devices
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
        params = {"text": experts[0]["text"], "experts": [each["backbone"] for each in experts]}
        for planned in plan_batches(denoiser, requests, texts, sampling, shape, rows):
            kinds = denoiser.backbone, denoiser.text, denoiser.process, denoiser.prediction, denoiser.boundary
            program, batch = _compile(*kinds, planned.transform, function), planned.batch
            if denoiser.mesh is not None:
                arguments = ProgramArguments({}, None, batch, None, planned.sample_times, np.int32(0))
                batch = put_on_devices(batch, make_argument_shardings(arguments, denoiser.mesh).batch)
            values = np.asarray(to_host(program(params, batch)), np.float32)
            for row, members in enumerate(planned.row_requests):
                results |= {index: values[:, row, slot] for slot, index in enumerate(members)}
    return np.stack([results[index] for index in range(len(requests))])


@functools.lru_cache(maxsize=16)
def _compile(
    backbone: nnx.GraphDef,
    text: nnx.GraphDef,
    process: Process,
    prediction: Prediction,
    boundary: float | None,
    transform: StepTransform | None,
    function: ClipFunction,
) -> Callable[[Any, SamplingBatch], Array]:
    """Return the jitted `run(params, batch)`, which is compiled once per shape of rows."""

    @jax.jit
    def run(params, batch: SamplingBatch):
        rows = jax.tree.map(jnp.asarray, batch.branches[0])
        keys = jax.random.wrap_key_data(jnp.asarray(batch.keys))
        context = nnx.merge(text, params["text"])(rows.text, rows.text_segments)
        models = [nnx.merge(backbone, each) for each in params["experts"]]
        experts = [make_rows_denoise(model, context, rows, keys, process, transform) for model in models]

        def compute_quantile(values, quantile):
            return rows.layout.expand(rows.layout.quantile(values, quantile))[..., None]

        clips = PackedLatents(
            rows=rows,
            data=rows.fields[START_LATENTS],
            keys=keys,
            process=process,
            prediction=prediction.with_quantile(compute_quantile),
            is_clean=None if transform is None else transform.get_clean_tokens(rows),
        )
        return function(experts[0] if boundary is None else _choose_expert(experts, boundary), clips)

    return run


def _choose_expert(experts: Sequence[DenoiseFn], boundary: float) -> DenoiseFn:
    """Return the denoise of two experts, the second one below the boundary."""
    noisy_expert, clean_expert = experts

    def denoise(noisy, time, state):
        return jax.lax.cond(time >= boundary, noisy_expert, clean_expert, noisy, time, state)

    return denoise
