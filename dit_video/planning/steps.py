"""Steps of an experiment as shapes: what training and sampling compile, without computing anything.

The functions are those of a run (`training.step`, `training.denoiser`, `generation.program`), with the experiment's own
denoiser, text encoder, loss and optimizer; states and batches are sharded as in a run.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from dit_video.autoencoders import latent_grid
from dit_video.backbones.flops import attention_flops, forward_flops, training_passes
from dit_video.core.errors import UserError
from dit_video.core.trees import flatten, map_with_path
from dit_video.data.windows import WindowConfig
from dit_video.diffusion import SampleTimes, Watched
from dit_video.distributed import batch_shardings, over_devices, row_shards, shardings
from dit_video.distributed.mesh import AnyMesh
from dit_video.distributed.planner import Step
from dit_video.experiment import DenoiserTraining, Experiment, GivenAutoencoder
from dit_video.experiment.initialization import denoiser_loss, init_denoiser, loss_parts, optimizer_of
from dit_video.generation import LatentRequest
from dit_video.generation.program import program_of, steps_of_program
from dit_video.generation.rows import Group, Packer
from dit_video.nn import graph_of, init_lora, init_params
from dit_video.nn.attention import default_block
from dit_video.text import ByteEncoderConfig, FrozenTextConfig
from dit_video.tokens import Grid, Item, empty_row
from dit_video.training.losses.adversarial import play
from dit_video.training.losses.distillation import distillation_loss
from dit_video.training.losses.lora import LoraLoss
from dit_video.training.optim.optimizer import make_optimizer
from dit_video.training.state import init_state, shapes_on_devices
from dit_video.training.step import Loss, OwnStep, StatefulLoss, make_step
from dit_video.weights import clip_vision_config

Part = Literal["denoiser", "autoencoder", "sampler"]
"""Part of an experiment: the training step of one of its two models, or the sampler's program."""

_PADDING = 64
"""Inverse of the smallest share of a row that counts as a further clip; a smaller rest is padding."""


class PlannedStep(NamedTuple):
    """A step that can be compiled, with its known costs."""

    step: Callable[..., Any]
    """The jitted step."""
    arguments: tuple[PyTree, ...]
    """Shapes of the arguments, with their shardings."""
    model_flops: int
    """Operations of the model on all devices, without recomputation."""
    turns: int = 1
    """Number of steps of a sampler."""
    room: int | None = None
    """Largest number of steps that its program supports."""
    known: Step | None = None
    """Costs of a denoiser that are counted without compiling."""
    layer_bytes: int = 0
    """Bytes of one layer's parameters."""


def clips_of(experiment: Experiment, count: int | None = None) -> list[int]:
    """Return the token counts of the clips that fill a row: `count` equal ones, or as many of the largest as fit.

    What is left of the row is one more clip, unless it is so small a part that it is padding.

    Raises:
      UserError: more clips than fit in a row.
    """
    rows = experiment.denoiser.rows
    if count is not None:
        if not 1 <= count <= min(rows.segments, rows.tokens):
            raise UserError(
                f"clips={count} is invalid: a row has room for 1 to {min(rows.segments, rows.tokens)}; use one of these"
            )
        return [rows.tokens // count + (index < rows.tokens % count) for index in range(count)]
    multiple, stride = experiment.limits.multiple, experiment.autoencoder.model.stride
    frames = latent_grid(Grid(experiment.data.max_frames, *multiple[1:]), stride).t
    largest = min(frames * (experiment.data.max_pixels // (multiple.h * multiple.w)), rows.tokens)
    full, rest = divmod(rows.tokens, largest)
    clips = [largest] * full + [rest] * (rest * _PADDING > rows.tokens)
    return clips[: rows.segments]


def plan_step(experiment: Experiment, part: Part, mesh: AnyMesh, *, clips: Sequence[int]) -> PlannedStep:
    """Return the step of a part of an experiment on a mesh, with rows of clips of these token counts.

    Raises:
      UserError: a part that is not trained; rows, heads or tokens that are not divisible by the mesh.
    """
    match part:
        case "denoiser":
            return _denoiser(experiment, mesh, clips)
        case "sampler":
            return _sampler(experiment, mesh, clips)
        case "autoencoder":
            return _autoencoder(experiment, mesh)


def _denoiser(experiment: Experiment, mesh: AnyMesh, clips: Sequence[int]) -> PlannedStep:
    config = experiment.denoiser
    base = denoiser_loss(experiment, mesh, empty=_empty_caption(config))
    optimizer = make_optimizer(optimizer_of(config), steps=config.steps)
    layout = functools.partial(shardings, mesh=mesh)
    init: Callable[[Array], dict[str, Any]] = functools.partial(init_denoiser, config)
    loss: Loss | OwnStep = base
    frozen: tuple[PyTree, ...] = ()
    if config.lora is not None or config.distillation is not None:
        weights = jax.eval_shape(init, jax.random.key(0))
        frozen = (_laid(weights, layout(weights)),)
    if config.distillation is not None:
        loss = distillation_loss(config.distillation, base)
    if (lora := config.lora) is not None:
        loss = LoraLoss(loss=base, scale=lora.scale)
        init = lambda key: init_lora(weights, lora, key)  # noqa: E731

    def begin(key: Array) -> Any:
        state = init_state(init(key), optimizer, averages=config.averages)
        return loss.begin(state, optimizer) if isinstance(loss, OwnStep) else state

    def step(state: Any, batch: Any, *constants: Any) -> Any:
        if isinstance(loss, OwnStep):
            make_it = loss.make_step
        else:
            make_it = functools.partial(make_step, loss, accumulate=config.accumulate)
        return make_it(optimizer, ema_decay=config.ema_decay, constants=constants)(state, batch)

    batch = _rows(config)
    arguments = (shapes_on_devices(begin, shardings=layout), _laid(batch, batch_shardings(batch, mesh)), *frozen)
    images = batch.image.shape[1] // config.rows.segments
    known = _known(config, clips, training=True, images=images)
    return PlannedStep(
        jax.jit(step, donate_argnums=0),
        arguments,
        model_flops=training_passes(adapters=config.lora is not None) * known.forward,
        known=known,
        layer_bytes=_layer_bytes(config, init),
    )


def _layer_bytes(config: DenoiserTraining, init: Callable[[Array], dict[str, Any]]) -> int:
    shapes = flatten(jax.eval_shape(init, jax.random.key(0)))
    stacked = [leaf for path, leaf in shapes.items() if "dit/blocks/" in path]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in stacked) // config.dit.layers


def _empty_caption(config: DenoiserTraining) -> np.ndarray:
    if isinstance(config.text, FrozenTextConfig):
        return np.zeros((1, config.text.width), np.float32)
    return config.text.tokenizer()("")


def _text_width(config: DenoiserTraining) -> int:
    return config.text.width if isinstance(config.text, FrozenTextConfig) else 0


def _rows(config: DenoiserTraining) -> PyTree:
    row = empty_row(config.rows, width=config.dit.token_width, text_width=_text_width(config), given=_item(config))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((config.batch, *leaf.shape), leaf.dtype), row)


def _item(config: DenoiserTraining) -> Item:
    """Return a clip of one token, with all conditioning fields of the training."""
    token, position = np.zeros((1, config.dit.token_width), np.float32), np.zeros((1, 3), np.float32)
    grey = config.known is not None and config.known.rest == "grey"
    image = None
    if config.image_encoder is not None:
        encoder = clip_vision_config(config.image_encoder)
        image = np.zeros((encoder.tokens, encoder.width), np.float32)
    return Item(token, position, np.zeros(0, np.int32), 0, shown=token if grey else None, image=image)


def _laid(shapes: PyTree, layouts: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), shapes, layouts
    )


def on_mesh(state: PyTree, mesh: AnyMesh) -> PyTree:
    """Return the shapes of a state, sharded as in a run."""
    return _laid(state, shardings(state, mesh))


def _known(config: DenoiserTraining, clips: Sequence[int], *, training: bool, images: int = 0, copies: int = 1) -> Step:
    """Return the counted costs of a denoiser's step, with texts as long as fit and `images` image tokens a clip."""
    dit, text = config.dit, min(config.text.max_tokens, config.rows.text // max(1, len(clips)))
    if isinstance(config.text, ByteEncoderConfig):
        text = -(-text // config.text.patch)
    grids = [Grid(1, 1, clip) for clip in clips]
    texts = [text] * len(clips)
    return Step(
        width=dit.width,
        hidden=dit.hidden_width,
        layers=dit.layers,
        tokens=config.rows.tokens,
        rows=config.batch * copies,
        itemsize=jnp.dtype(dit.dtype).itemsize,
        remat=dit.remat,
        forward=copies * config.batch * forward_flops(dit, grids, texts, images=[images] * len(clips)),
        attention=copies * config.batch * attention_flops(dit, grids, texts),
        fused=dit.attention not in ("dense", "auto", "chunked"),
        block=default_block(config.rows.tokens) if dit.attention == "splash" else None,
        training=training,
    )


def _sampler(experiment: Experiment, mesh: AnyMesh, clips: Sequence[int]) -> PlannedStep:
    config, sampling = experiment.denoiser, experiment.sampling
    make = over_devices(config.dit.make, mesh, experiment.mesh.context_attention)
    guidance = sampling.full_guidance
    empty_caption = _empty_caption(config)
    patch = config.dit.patch
    noise = [np.zeros((1, patch.h, patch.w * clip, config.dit.channels), np.float32) for clip in clips]
    requests = [LatentRequest("", "", part) for _ in range(config.batch) for part in noise]
    packer = Packer(requests, {"": empty_caption}, patch, 1.0, guidance.branches, config.batch)
    members = np.arange(len(requests)).reshape(config.batch, -1).tolist()
    batch = packer.batch(Group(config.rows, False, members), members)
    process, solver = config.objective.process, Watched(solver=sampling.solver, recorded=False)
    batched = sampling.branches == "together"
    program = program_of(
        graph_of(make), graph_of(config.text.make), process, config.objective.prediction, solver, batched
    )
    state = jax.eval_shape(
        lambda tokens: solver.init(process.start(tokens), steps=sampling.steps), batch.branches[0][0].tokens
    )
    params = jax.eval_shape(functools.partial(init_denoiser, config), jax.random.key(0))
    replicated = NamedSharding(mesh, PartitionSpec())
    room = steps_of_program(sampling.steps)
    times = jax.ShapeDtypeStruct((room + 1,), jnp.float32, sharding=replicated)
    strength = guidance.strength(0) if guidance.branches > 1 else None
    if strength is None:
        batch = batch._replace(branches=batch.branches[:1])
    arguments = (
        _laid(params, shardings(params, mesh)),
        _laid_rows(state, mesh, config.batch),
        _laid_rows(batch, mesh, config.batch),
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.asarray(leaf).dtype, sharding=replicated), strength
        ),
        SampleTimes(times, times),  # type: ignore[arg-type]  # their shapes
        jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
    )
    known = _known(config, clips, training=False, copies=guidance.branches)
    layers = _layer_bytes(config, functools.partial(init_denoiser, config))
    flops = sampling.steps * known.forward
    return PlannedStep(program, arguments, flops, turns=sampling.steps, room=room, known=known, layer_bytes=layers)


def _laid_rows(shapes: PyTree, mesh: AnyMesh, rows: int) -> PyTree:
    """Return shapes whose rows, and tokens, are sharded as a training batch's; all else is replicated."""

    def layout(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        split: NamedSharding = NamedSharding(mesh, PartitionSpec())
        if leaf.ndim and leaf.shape[0] == rows and rows % row_shards(mesh) == 0:
            # A solver's state has the shape of the noisy tokens.
            name = "tokens" if leaf.ndim == 3 and path.startswith("solver/") else path
            split = batch_shardings({name: leaf}, mesh)[name]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split)

    return map_with_path(layout, shapes)


def _autoencoder(experiment: Experiment, mesh: AnyMesh) -> PlannedStep:
    config = experiment.autoencoder
    if isinstance(config, GivenAutoencoder):
        raise UserError("the autoencoder of this experiment is pretrained; plan its denoiser or its sampler")
    parts = loss_parts(config, experiment.seed)
    loss, discriminator, constants = parts["loss"], parts["rival"], parts["constants"]
    optimizer = make_optimizer(config.optimizer, steps=config.steps)

    def begin(key: Array) -> Any:
        params = init_params(config.model.make, key)
        extra = loss.start(params, fresh=True) if isinstance(loss, StatefulLoss) else None
        state = init_state(params, optimizer, extra)
        return state if discriminator is None else discriminator.join(state)

    def step(state: Any, clips: Any, *constants: Any) -> Any:
        if discriminator is None:
            return make_step(loss, optimizer, ema_decay=config.ema_decay, constants=constants)(state, clips)
        # The program with the discriminator's penalty is the largest.
        adversarial_step = play(loss, optimizer, discriminator, ema_decay=config.ema_decay, penalised=True)
        return adversarial_step(state, clips, *constants)

    window = max(config.windows, key=_pixels)
    if window.batch % (shards := row_shards(mesh)):
        raise UserError(
            f"windows in batches of {window.batch} do not divide among {shards} devices along data and fsdp; set "
            f"autoencoder windows of batch={window.batch + -window.batch % shards}, or use fewer chips"
        )
    batch = jax.ShapeDtypeStruct((window.batch, *window.size, 3), jnp.uint8)
    replicated = jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), constants)
    arguments = (
        shapes_on_devices(begin, shardings=functools.partial(shardings, mesh=mesh)),
        _laid(batch, batch_shardings(batch, mesh)),
        *_laid(constants, replicated),
    )
    jitted = jax.jit(step, donate_argnums=0)
    unsharded = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    flops = jitted.lower(*unsharded).cost_analysis() or {}
    return PlannedStep(jitted, arguments, model_flops=int(flops.get("flops", 0)))


def _pixels(window: WindowConfig) -> int:
    return window.batch * window.size.volume
