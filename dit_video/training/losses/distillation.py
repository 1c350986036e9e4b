"""Distillation on packed rows: a student of few steps learns from a frozen teacher that it starts as.

A step is one jitted function of a state and a batch, as every training's is, so that checkpoints, resuming and logs are
the same. The teacher is the step's constant; its guidance is baked in: the student is sampled without.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree, Shaped

from dit_video.backbones.denoise import packed_denoise
from dit_video.backbones.dit import Given
from dit_video.conditioning import drop_captions
from dit_video.core.errors import UserError
from dit_video.core.rng import example_keys, key
from dit_video.diffusion import (
    Denoise,
    Estimator,
    Objective,
    classifier_free,
    consistency_function,
    consistency_loss,
    distance,
    estimator,
    flow_step,
    low_discrepancy,
    matching_gradient,
    matching_loss,
    multistep,
)
from dit_video.tokens import Rows, segment_mean, to_tokens
from dit_video.training.losses.denoiser import DenoiserLoss, clip_sizes, packed_noise
from dit_video.training.state import TrainState, WithModel
from dit_video.training.step import Step, following, unless_broken, with_constants

_EDGE = 0.02
"""How near to data and to noise samples are judged by their scores, at least (arXiv 2311.18828)."""


@dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation:
    """Latent consistency (arXiv 2310.04378): where the student's moving average gets to from the end of a teacher's
    step, the student is to get to from its beginning.

    Raises:
      UserError: less than one interval, or a width that is not positive.
    """

    guidance: float = 1.0
    """of the teacher; 1 is none"""
    intervals: int = 32
    """Into which the teacher's way is divided, evenly before the shift: a step of the teacher each (the paper's steps
    of training divided by its k)."""
    width: float = 0.03
    """differences below it count by their squares, larger ones by their size"""

    def __post_init__(self):
        if self.intervals < 1 or not self.width > 0:
            raise UserError(
                f"consistency is taught over at least 1 interval, with a positive width; got intervals="
                f"{self.intervals}, width={self.width}"
            )

    def begin(self, state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first step."""
        return state


@dataclass(frozen=True, kw_only=True)
class DistributionMatching:
    """DMD2 (arXiv 2405.14867), without its discriminator: samples are moved to where the teacher's score outweighs that
    of a critic, which learns to denoise the samples.

    Raises:
      UserError: less than one step.
    """

    guidance: float = 1.0
    """of the teacher; 1 is none"""
    steps: int = 4
    """of the student; in training each is given what the student's own earlier steps have made"""
    critic_steps: int = 5
    """of the critic, before each of the student's"""

    def __post_init__(self):
        if min(self.steps, self.critic_steps) < 1:
            raise UserError(
                f"distribution matching takes at least 1 step of the student and of the critic; got steps={self.steps}"
                f", critic_steps={self.critic_steps}"
            )

    def begin(self, state: TrainState, optimizer: optax.GradientTransformation) -> "MatchingState":
        """The state before the first step: the critic starts as the teacher too."""
        params = jax.tree.map(jnp.copy, state.params)
        return MatchingState(model=state, critic=CriticState(params=params, opt_state=optimizer.init(params)))


Distillation = ConsistencyDistillation | DistributionMatching


@flax.struct.dataclass
class CriticState:
    """What the critic carries from step to step."""

    params: dict[str, Any]
    opt_state: PyTree


@flax.struct.dataclass
class MatchingState(WithModel):
    """Both players. Checkpoints hold them together, so that a run goes on exactly."""

    model: TrainState
    critic: CriticState


def paced(critic: CriticState, student: TrainState) -> CriticState:
    """The critic, whose next step has the learning rate of the student's.

    It moves several times for each time that the student does. By a schedule of its own steps it would stand still,
    and the student run away from it, once it had made as many as the student is to make.
    """

    def schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    states = critic.opt_state, student.opt_state
    chosen = jax.tree.map(lambda own, other: other if schedule(other) else own, *states, is_leaf=schedule)
    return CriticState(params=critic.params, opt_state=chosen)


def distillation_loss(config: Distillation, loss: DenoiserLoss) -> "ConsistencyLoss | MatchingLoss":
    """Of a student, from the loss that its teacher was trained with."""
    parts: dict[str, Any] = {
        "dit": loss.dit,
        "text": loss.text,
        "objective": loss.objective,
        "empty_caption": loss.empty_caption,
        "seed": loss.seed,
    }
    if isinstance(config, ConsistencyDistillation):
        return ConsistencyLoss(config=config, **parts)
    return MatchingLoss(config=config, **parts)


@dataclass(frozen=True, kw_only=True)
class _Taught:
    """A student and its teacher, one model with two sets of parameters, on rows. Times are `[B N 1]`.

    Noise and times are functions of the seed, the step and the example, as everywhere.
    """

    dit: nnx.GraphDef
    text: nnx.GraphDef
    objective: Objective
    empty_caption: Shaped[np.ndarray, "s *E"]
    seed: int

    def denoise(self, params: PyTree, rows: Rows, *, silent: bool = False) -> Denoise:
        """The model with its prompts, or with none."""
        text, text_segments = jnp.asarray(rows.text), jnp.asarray(rows.text_segments)
        if silent:
            drop = jnp.ones(rows.examples.shape, bool)
            text, text_segments = drop_captions(text, text_segments, drop, empty=self.empty_caption)
        context, count = nnx.merge(self.text, params["text"])(text, text_segments), rows.examples.shape[1]
        denoise = packed_denoise(
            nnx.merge(self.dit, params["dit"]),
            segments=rows.segments,
            coordinates=rows.coordinates,
            context=context.values,
            context_segments=context.segments,
            count=count,
            given=Given(labels=context.classes(count)),
        )
        return lambda noisy, time: denoise(noisy, jnp.broadcast_to(time, (*noisy.shape[:-1], 1))[..., 0])

    def guided(self, params: PyTree, rows: Rows, scale: float) -> Denoise:
        """The teacher."""
        denoise = self.denoise(params, rows)
        return denoise if scale == 1 else classifier_free(denoise, self.denoise(params, rows, silent=True), scale)

    def consistency(self, params: PyTree, rows: Rows) -> Callable[[Array, Array], Array]:
        return consistency_function(self.denoise(params, rows), self.objective.process, self.objective.prediction)

    def estimate(self, denoise: Denoise) -> Estimator:
        return estimator(denoise, self.objective.process, self.objective.prediction)

    def noise(self, purpose: str, rows: Rows, step: Array, number: Array | int = 0) -> Float[Array, "B N p"]:
        purpose_key = jax.random.fold_in(key(self.seed, purpose), number)
        return packed_noise(rows, example_keys(purpose_key, step, rows.examples))

    def uniform(self, purpose: str, rows: Rows, step: Array) -> Float[Array, "B G"]:
        """Numbers in [0, 1), evenly spread over consecutive examples."""
        offset = jax.random.uniform(jax.random.fold_in(key(self.seed, purpose), step))
        return low_discrepancy(offset, rows.examples)

    def shifted(self, time: Float[Array, "B G"], rows: Rows) -> Float[Array, "B N 1"]:
        """Evenly spaced times of clips as the process wants them spaced, for their tokens."""
        return to_tokens(self.objective.process.shifted(time, clip_sizes(rows)), rows.segments)[..., None]

    def mean(self, per_token: Float[Array, "B N"], rows: Rows) -> Float[Array, ""]:
        """Over the clips of a batch, of each clip's mean."""
        per_example = segment_mean(per_token, rows.segments, count=rows.examples.shape[1])
        return (per_example * rows.valid).sum() / jnp.maximum(rows.valid.sum(), 1)


@dataclass(frozen=True, kw_only=True)
class ConsistencyLoss(_Taught):
    """The step of `ConsistencyDistillation`; its state is that of any training."""

    config: ConsistencyDistillation

    def begin(self, state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
        return self.config.begin(state, optimizer)

    def make_step(
        self, optimizer: optax.GradientTransformation, *, ema_decay: float, constants: tuple[PyTree, ...]
    ) -> Step:
        """`step(state, rows) -> (state, figures)`, the state being donated; `constants` are the teacher's parameters.

        The moving average that is the target is the one that is sampled from.
        """

        def step(state, rows, teacher):
            value, gradients = jax.value_and_grad(self)(state.params, state.ema, rows, state.step, teacher)
            figures = {"loss": value, "gradient_norm": optax.tree.norm(gradients)}
            after = following(state, gradients, optimizer, ema_decay=ema_decay)
            return unless_broken(state, after, figures)

        return with_constants(jax.jit(step, donate_argnums=0), constants)

    def __call__(self, params: PyTree, average: PyTree, rows: Rows, step: Array, teacher: PyTree) -> Float[Array, ""]:
        """The mean over clips, each at a time of its own."""
        process, intervals = self.objective.process, self.config.intervals
        index = jnp.minimum(jnp.floor(self.uniform("time", rows, step) * intervals), intervals - 1)
        time, ahead = (self.shifted(1 - (index + late) / intervals, rows) for late in (0, 1))
        noisy = process.add_noise(jnp.asarray(rows.tokens), self.noise("noise", rows, step), time)
        taught = self.estimate(self.guided(teacher, rows, self.config.guidance))
        reached = jax.lax.stop_gradient(flow_step(taught, process, noisy, time, ahead))
        student, target = self.consistency(params, rows), self.consistency(average, rows)
        return self.mean(consistency_loss(student, target, noisy, reached, time, ahead, width=self.config.width), rows)


@dataclass(frozen=True, kw_only=True)
class MatchingLoss(_Taught):
    """The step of `DistributionMatching`. Of the data it sees the captions and the sizes alone."""

    config: DistributionMatching

    def begin(self, state: TrainState, optimizer: optax.GradientTransformation) -> MatchingState:
        return self.config.begin(state, optimizer)

    def make_step(
        self, optimizer: optax.GradientTransformation, *, ema_decay: float, constants: tuple[PyTree, ...]
    ) -> Step:
        """`step(state, rows) -> (state, figures)` for a `MatchingState`, which is donated.

        First the critic moves `critic_steps` times, then the student once, by the same optimizer and at the learning
        rate of the student's step. The figures are
        `loss` (half the square of what samples are moved by, which has no minimum to reach), `critic` (its mean loss)
        and `distance` (of samples from the teacher's estimate of their data).
        """

        def step(state, rows, teacher):
            params, number = state.model.params, state.model.step

            def improve(critic, turn):
                at = number * self.config.critic_steps + turn
                generated = jax.lax.stop_gradient(self.generated(params, rows, *self.noised(params, rows, at)))
                value, gradients = jax.value_and_grad(self.critic_loss)(critic.params, generated, rows, at)
                updates, opt_state = optimizer.update(gradients, critic.opt_state, critic.params)
                moved = CriticState(params=optax.apply_updates(critic.params, updates), opt_state=opt_state)
                return paced(moved, state.model), value

            turns = jnp.arange(self.config.critic_steps)
            critic, losses = jax.lax.scan(improve, paced(state.critic, state.model), turns)
            noised = self.noised(params, rows, number, purpose="student ")
            (value, figures), gradients = jax.value_and_grad(self, has_aux=True)(
                params, critic.params, noised, rows, number, teacher
            )
            figures |= {"loss": value, "gradient_norm": optax.tree.norm(gradients), "critic": losses.mean()}
            model = following(state.model, gradients, optimizer, ema_decay=ema_decay)
            return unless_broken(state, MatchingState(model=model, critic=critic), figures, "critic")

        return with_constants(jax.jit(step, donate_argnums=0), constants)

    def __call__(
        self,
        params: PyTree,
        critic: PyTree,
        noised: tuple[Float[Array, "B N p"], Float[Array, "B N 1"]],
        rows: Rows,
        step: Array,
        teacher: PyTree,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The student's loss: mean over clips, each judged at a time of its own."""
        process, count = self.objective.process, rows.examples.shape[1]
        generated = self.generated(params, rows, *noised)
        samples = jax.lax.stop_gradient(generated)
        time = self.shifted(_EDGE + (1 - 2 * _EDGE) * self.uniform("time", rows, step), rows)
        noisy = process.add_noise(samples, self.noise("noise", rows, step), time)
        real = self.estimate(self.guided(teacher, rows, self.config.guidance))(noisy, time).data
        fake = self.estimate(self.denoise(critic, rows))(noisy, time).data
        away = segment_mean(distance(samples, real), rows.segments, count=count)
        gradient = matching_gradient(samples, real, fake, to_tokens(away, rows.segments)[..., None])
        figures = {"distance": (away * rows.valid).sum() / jnp.maximum(rows.valid.sum(), 1)}
        return self.mean(matching_loss(generated, jax.lax.stop_gradient(gradient)), rows), figures

    def critic_loss(
        self, critic: PyTree, generated: Float[Array, "B N p"], rows: Rows, step: Array
    ) -> Float[Array, ""]:
        """Of denoising samples, at the times that the teacher was trained at."""
        time = self.objective.time(self.uniform("critic time", rows, step), clip_sizes(rows))
        time = to_tokens(time, rows.segments)
        noise = self.noise("critic noise", rows, step)
        denoise = self.denoise(critic, rows)
        per_token = self.objective.loss(lambda noisy, at: denoise(noisy, at[..., None]), generated, noise, time)
        return self.mean(per_token, rows)

    def noised(
        self, params: PyTree, rows: Rows, step: Array, *, purpose: str = ""
    ) -> tuple[Float[Array, "B N p"], Float[Array, "B N 1"]]:
        """What one of the student's steps is given, drawn for the whole batch, and its time (section 4.5 of the paper).

        It is what the steps before it have made, as in sampling.
        """
        process, steps = self.objective.process, self.config.steps
        every = jnp.ones(rows.examples.shape)
        times = jnp.stack([self.shifted((1 - number / steps) * every, rows) for number in range(steps + 1)])
        drawn: Int[Array, ""] = jax.random.randint(
            jax.random.fold_in(key(self.seed, f"{purpose}generator step"), step), (), 0, steps
        )

        def draw(number):
            return self.noise(f"{purpose}generator noise", rows, step, number + 1)

        start = self.noise(f"{purpose}generator noise", rows, step)
        f = self.consistency(params, rows)
        return multistep(f, start, times, process=process, draw=draw, steps=drawn), times[drawn]

    def generated(
        self, params: PyTree, rows: Rows, noisy: Float[Array, "B N p"], time: Float[Array, "B N 1"]
    ) -> Float[Array, "B N p"]:
        """The samples of one step."""
        return self.consistency(params, rows)(noisy, time)
