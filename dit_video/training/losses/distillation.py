"""Few-step distillation on packed rows: a student, initialized from a frozen teacher, learns from it.

The teacher's guidance is distilled into the student, which is sampled without. The steps are `ConsistencyStep` and
`MatchingStep`.
"""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.rng import example_keys, key
from dit_video.diffusion import (
    DenoiseFn,
    Estimator,
    apply_classifier_free_guidance,
    compute_distance,
    consistency_loss,
    draw_low_discrepancy,
    make_consistency_fn,
    make_estimator,
    matching_gradient,
    matching_loss,
    run_multistep,
    step_along_flow,
)
from dit_video.models.backbones.denoise import make_denoise_fn, make_text_record
from dit_video.models.conditioning import Conditioning, drop_captions
from dit_video.tokens import PackedBatch, expand_to_tokens, segment_mean
from dit_video.training.losses.denoiser import DenoiserLoss, attach_factors, get_clip_sizes
from dit_video.training.optim.ema import EmaConfig
from dit_video.training.state import CompositeState, TrainState
from dit_video.training.step import Constants, Metrics, ModelStep, apply_updates, finish_step

_TIME_MARGIN = 0.02
"""Distance from times 0 and 1 at which the scores of samples are not compared (arXiv 2311.18828)."""


@dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation:
    """Configuration of latent consistency distillation (arXiv 2310.04378).

    The student's output at the beginning of a teacher's step is trained to match the output of the student's moving
    average at the end of that step.

    Raises:
      UserError: If there is less than one interval, or if a width is not positive.
    """

    guidance: float = 1.0
    """Guidance scale of the teacher; 1 disables guidance."""
    intervals: int = 32
    """Number of the teacher's steps from noise to data, at times evenly spaced before the shift (in the paper, the
    number of training timesteps divided by k)."""
    width: float = 0.03
    """Width of the quadratic part of the pseudo-Huber loss; larger differences count linearly."""

    def __post_init__(self):
        if self.intervals < 1 or not self.width > 0:
            rule = "use 1 interval or more, and a positive width."
            raise UserError(f"intervals={self.intervals}, width={self.width} is invalid: {rule}")


@dataclass(frozen=True, kw_only=True)
class DistributionMatching:
    """Configuration of distribution matching distillation: DMD2 (arXiv 2405.14867) without its discriminator.

    Samples move along the difference between the scores of the teacher and of a critic, which is trained to denoise the
    student's samples.

    Raises:
      UserError: If there is less than one step.
    """

    guidance: float = 1.0
    """Guidance scale of the teacher; 1 disables guidance."""
    steps: int = 4
    """Number of sampling steps of the student; in training, each starts from the output of its own earlier steps."""
    critic_steps: int = 5
    """Number of critic updates before each update of the student."""

    def __post_init__(self):
        check_at_least(1, steps=self.steps, critic_steps=self.critic_steps)


Distillation = ConsistencyDistillation | DistributionMatching


@dataclass(frozen=True, kw_only=True)
class _DistillationLoss:
    """A student and its teacher, one model with two sets of parameters, on rows. Times are `[B N 1]`.

    Noise and times are functions of the seed, the step and the example.
    """

    denoiser: DenoiserLoss
    """Loss of the student, which has its models, objective and seed."""

    def make_denoise(self, params: PyTree, rows: PackedBatch, *, unconditional: bool = False) -> DenoiseFn:
        """Return the denoiser conditioned on its captions, or on empty ones if `unconditional`."""
        text, text_segments = jnp.asarray(rows.text), jnp.asarray(rows.text_segments)
        if unconditional:
            drop = jnp.ones(rows.examples.shape, bool)
            text, text_segments = drop_captions(text, text_segments, drop, empty=self.denoiser.empty_caption)
        context = nnx.merge(self.denoiser.text_encoder, params["text"])(text, text_segments)
        conditioning = Conditioning(make_text_record(context, rows.layout))
        denoise = make_denoise_fn(nnx.merge(self.denoiser.backbone, params["backbone"]), rows.layout, conditioning)
        return lambda noisy, time, state: denoise(noisy, jnp.broadcast_to(time, (*noisy.shape[:-1], 1))[..., 0], state)

    def make_guided_denoise(self, params: PyTree, rows: PackedBatch, scale: float) -> DenoiseFn:
        """Return the teacher with classifier-free guidance."""
        denoise = self.make_denoise(params, rows)
        if scale == 1:
            return denoise
        return apply_classifier_free_guidance(denoise, self.make_denoise(params, rows, unconditional=True), scale)

    def make_consistency_function(self, params: PyTree, rows: PackedBatch) -> Callable[[Array, Array], Array]:
        return make_consistency_fn(
            self.make_denoise(params, rows), self.denoiser.objective.process, self.denoiser.objective.prediction
        )

    def make_estimator(self, denoise: DenoiseFn) -> Estimator:
        return make_estimator(denoise, self.denoiser.objective.process, self.denoiser.objective.prediction)

    def draw_noise(self, purpose: str, rows: PackedBatch, step: Array, index: Array | int = 0) -> Float[Array, "B N p"]:
        purpose_key = jax.random.fold_in(key(self.denoiser.seed, purpose), index)
        keys = example_keys(purpose_key, step, rows.examples)
        return rows.layout.sample_noise(keys, rows.tokens.shape[-1])

    def draw_uniform(self, purpose: str, rows: PackedBatch, step: Array) -> Float[Array, "B G"]:
        """Return uniform numbers in [0, 1), low-discrepancy over consecutive examples."""
        offset = jax.random.uniform(jax.random.fold_in(key(self.denoiser.seed, purpose), step))
        return draw_low_discrepancy(offset, rows.examples)

    def shift_times(self, time: Float[Array, "B G"], rows: PackedBatch) -> Float[Array, "B N 1"]:
        """Return the shifted times of clips' tokens, from evenly spaced times of clips."""
        return expand_to_tokens(self.denoiser.objective.process.shift_time(time, get_clip_sizes(rows)), rows.segments)[
            ..., None
        ]

    def mean_over_clips(self, per_token: Float[Array, "B N"], rows: PackedBatch) -> Float[Array, ""]:
        """Return the mean over the clips of a batch of each clip's mean."""
        per_example = rows.layout.mean(per_token)
        return (per_example * rows.valid).sum() / jnp.maximum(rows.valid.sum(), 1)


@dataclass(frozen=True, kw_only=True)
class ConsistencyLoss(_DistillationLoss):
    """Loss of `ConsistencyDistillation`."""

    config: ConsistencyDistillation

    def __call__(
        self, params: PyTree, ema: PyTree, rows: PackedBatch, step: Array, teacher: PyTree
    ) -> Float[Array, ""]:
        """Return the mean loss over the clips, each at its own time."""
        process = self.denoiser.objective.process
        time, next_time = self._draw_interval(rows, step)
        noisy = process.add_noise(jnp.asarray(rows.tokens), self.draw_noise("noise", rows, step), time)
        teacher_estimator = self.make_estimator(self.make_guided_denoise(teacher, rows, self.config.guidance))
        next_noisy = jax.lax.stop_gradient(step_along_flow(teacher_estimator, process, noisy, time, next_time))
        student, target = self.make_consistency_function(params, rows), self.make_consistency_function(ema, rows)
        per_token = consistency_loss(student, target, noisy, next_noisy, time, next_time, width=self.config.width)
        return self.mean_over_clips(per_token, rows)

    def draw_time(self, rows: PackedBatch, step: Array) -> Float[Array, "B N 1"]:
        """Return the times at which the student is trained in a step."""
        return self._draw_interval(rows, step)[0]

    def _draw_interval(self, rows: PackedBatch, step: Array) -> tuple[Float[Array, "B N 1"], Float[Array, "B N 1"]]:
        """Return the times at the beginning and the end of a teacher's step."""
        intervals = self.config.intervals
        index = jnp.minimum(jnp.floor(self.draw_uniform("time", rows, step) * intervals), intervals - 1)
        time, next_time = (self.shift_times(1 - (index + offset) / intervals, rows) for offset in (0, 1))
        return time, next_time


@dataclass(frozen=True, kw_only=True)
class MatchingLoss(_DistillationLoss):
    """Losses of student and critic of `DistributionMatching`, which uses only the captions and sizes of the data."""

    config: DistributionMatching

    def __call__(
        self, params: PyTree, critic: PyTree, rows: PackedBatch, step: Array, teacher: PyTree
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the student's loss, a mean over clips whose scores are compared at their own times, and metrics."""
        process, count = self.denoiser.objective.process, rows.examples.shape[1]
        generated = self.generate(params, rows, step, purpose="student ")
        samples = jax.lax.stop_gradient(generated)
        time = self.shift_times(_TIME_MARGIN + (1 - 2 * _TIME_MARGIN) * self.draw_uniform("time", rows, step), rows)
        noisy = process.add_noise(samples, self.draw_noise("noise", rows, step), time)
        real = self.make_estimator(self.make_guided_denoise(teacher, rows, self.config.guidance))(noisy, time).data
        fake = self.make_estimator(self.make_denoise(critic, rows))(noisy, time).data
        distances = segment_mean(compute_distance(samples, real), rows.segments, count=count)
        gradient = matching_gradient(samples, real, fake, expand_to_tokens(distances, rows.segments)[..., None])
        metrics = {"distance": (distances * rows.valid).sum() / jnp.maximum(rows.valid.sum(), 1)}
        return self.mean_over_clips(matching_loss(generated, jax.lax.stop_gradient(gradient)), rows), metrics

    def critic_loss(self, critic: PyTree, params: PyTree, rows: PackedBatch, step: Array) -> Float[Array, ""]:
        """Return the critic's loss: denoising of the student's samples at times that the teacher was trained at."""
        samples = jax.lax.stop_gradient(self.generate(params, rows, step))
        time = self.denoiser.objective.compute_time(self.draw_uniform("critic time", rows, step), get_clip_sizes(rows))
        time = expand_to_tokens(time, rows.segments)
        noise = self.draw_noise("critic noise", rows, step)
        denoise = self.make_denoise(critic, rows)
        per_token = self.denoiser.objective.loss(
            lambda noisy, token_time, state: denoise(noisy, token_time[..., None], state), samples, noise, time
        )
        return self.mean_over_clips(per_token, rows)

    def generate(self, params: PyTree, rows: PackedBatch, step: Array, *, purpose: str = "") -> Float[Array, "B N p"]:
        """Return the student's samples by one of its steps, drawn for the whole batch.

        Its input is the output of the student's earlier steps, as in sampling (arXiv 2405.14867, section 4.5), through
        which no gradient passes.
        """
        index, times = self._draw_index(step, purpose), self._make_times(rows)

        def draw(number):
            return self.draw_noise(f"{purpose}generator noise", rows, step, number + 1)

        initial_noise = self.draw_noise(f"{purpose}generator noise", rows, step)
        earlier = self.make_consistency_function(jax.lax.stop_gradient(params), rows)
        process = self.denoiser.objective.process
        noisy = run_multistep(earlier, initial_noise, times, process=process, noise_fn=draw, steps=index)
        return self.make_consistency_function(params, rows)(noisy, times[index])

    def draw_time(self, rows: PackedBatch, step: Array) -> Float[Array, "B N 1"]:
        """Return the times at which the student is trained in a step."""
        return self._make_times(rows)[self._draw_index(step, "student ")]

    def _draw_index(self, step: Array, purpose: str) -> Int[Array, ""]:
        step_key = jax.random.fold_in(key(self.denoiser.seed, f"{purpose}generator step"), step)
        return jax.random.randint(step_key, (), 0, self.config.steps)

    def _make_times(self, rows: PackedBatch) -> Float[Array, "steps B N 1"]:
        """Return the times of the student's steps, and 0."""
        steps, ones = self.config.steps, jnp.ones(rows.examples.shape)
        return jnp.stack([self.shift_times((1 - number / steps) * ones, rows) for number in range(steps + 1)])


@flax.struct.dataclass
class CriticState:
    """Trained parameters and optimizer state of the critic."""

    params: dict[str, Any]
    opt_state: PyTree


@flax.struct.dataclass
class MatchingState(CompositeState):
    """State of student and critic, saved in one checkpoint so that a run resumes exactly."""

    model: TrainState
    critic: CriticState


def with_student_learning_rate(critic: CriticState, student: TrainState) -> CriticState:
    """Return the critic with the schedule state of the student, so that both have the same learning rate.

    The critic is updated several times for each update of the student. A schedule over its own updates would end long
    before the student's training does, and the critic could no longer follow the student.
    """

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def choose(critic_leaf: Any, student_leaf: Any) -> Any:
        return student_leaf if is_schedule(student_leaf) else critic_leaf

    opt_state = jax.tree.map(choose, critic.opt_state, student.opt_state, is_leaf=is_schedule)
    return CriticState(params=critic.params, opt_state=opt_state)


def make_distillation_step(
    config: Distillation,
    loss: DenoiserLoss,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    averages: EmaConfig | None = None,
    lora_scale: float | None = None,
) -> "ConsistencyStep | MatchingStep":
    """Return the step of a student, from the loss that its teacher was trained with.

    The parameters of the teacher are the last constant of the step. The trained parameters are all of a model or, with
    the scale of an adapter (alpha / rank), its factors.
    """
    options: dict[str, Any] = {"optimizer": optimizer, "ema_decay": ema_decay, "averages": averages}
    options["lora_scale"] = lora_scale
    if isinstance(config, ConsistencyDistillation):
        return ConsistencyStep(loss=ConsistencyLoss(config=config, denoiser=loss), **options)
    return MatchingStep(loss=MatchingLoss(config=config, denoiser=loss), **options)


ParameterLoss = Callable[[dict[str, PyTree], PackedBatch, Array, PyTree], tuple[Float[Array, ""], Metrics]]
"""Function of all parameters by their names, rows, step and teacher that returns a loss and metrics."""


@dataclass(frozen=True, kw_only=True)
class StudentStep(ModelStep, abc.ABC):
    """The step of a student and of what is trained with it, whose parameters are a model's or an adapter's factors.

    The parameters have the names "student" and, depending on the method, "critic" and "average".
    """

    loss: ConsistencyLoss | MatchingLoss
    """Losses, of parameters of models."""
    lora_scale: float | None = None
    """Scale of the adapter of the teacher, alpha / rank; None where the trained parameters are a model's."""

    @property
    @abc.abstractmethod
    def losses(self) -> Mapping[str, ParameterLoss]:
        """Return the losses by the names of the parameters that each of them trains."""

    @abc.abstractmethod
    def get_params(self, state: Any) -> dict[str, PyTree]:
        """Return all parameters in a state, by their names."""

    def make_params(self, trained: dict[str, PyTree], teacher: PyTree) -> dict[str, PyTree]:
        """Return the parameters of models by their names, from the trained ones."""
        if self.lora_scale is None:
            return trained
        return {name: attach_factors(teacher, factors, self.lora_scale) for name, factors in trained.items()}

    def _differentiate(
        self, name: str, params: dict[str, PyTree], rows: PackedBatch, step: Array, teacher: PyTree
    ) -> tuple[tuple[Float[Array, ""], Metrics], PyTree]:
        """Return the loss of the parameters of a name, its metrics, and its gradients with respect to these alone."""

        def compute(trained):
            return self.losses[name](params | {name: trained}, rows, step, teacher)

        return jax.value_and_grad(compute, has_aux=True)(params[name])


@dataclass(frozen=True, kw_only=True)
class ConsistencyStep(StudentStep):
    """The step of a student of `ConsistencyDistillation`.

    The target network is the moving average that is also sampled from.
    """

    loss: ConsistencyLoss

    @property
    def losses(self) -> Mapping[str, ParameterLoss]:
        return {"student": self._compute_loss}

    def get_params(self, state: TrainState) -> dict[str, PyTree]:
        return {"student": state.params, "average": state.ema}

    def update(self, state: TrainState, batch: PackedBatch, constants: Constants = ()) -> tuple[TrainState, Metrics]:
        params = self.get_params(state)
        (value, metrics), gradients = self._differentiate("student", params, batch, state.step, *constants)
        metrics |= {"loss": value, "gradient_norm": optax.tree.norm(gradients)}
        next_state = apply_updates(state, gradients, self.optimizer, ema_decay=self.ema_decay)
        return finish_step(state, next_state, batch, metrics)

    def _compute_loss(self, params, rows, step, teacher):
        models = self.make_params(params, teacher)
        return self.loss(models["student"], models["average"], rows, step, teacher), {}


@dataclass(frozen=True, kw_only=True)
class MatchingStep(StudentStep):
    """The step of a student and its critic, on a `MatchingState`.

    The critic is updated `critic_steps` times, then the student once, with the same optimizer and learning rate. The
    metrics are `loss` (half the squared displacement of samples, which does not converge to a minimum), `critic` (mean
    loss of the critic) and `distance` (of samples from the teacher's estimate of their data).
    """

    loss: MatchingLoss

    @property
    def losses(self) -> Mapping[str, ParameterLoss]:
        return {"student": self._compute_loss, "critic": self._compute_critic_loss}

    def init(self, params: dict[str, Any], *, is_fresh: bool = True) -> MatchingState:
        """Return the state before the first step, with a critic that is initialized from the teacher too."""
        model = super().init(params)
        own = jax.tree.map(jnp.copy, model.params)
        return MatchingState(model=model, critic=CriticState(params=own, opt_state=self.optimizer.init(own)))

    def get_params(self, state: MatchingState) -> dict[str, PyTree]:
        return {"student": state.model.params, "critic": state.critic.params}

    def update(
        self, state: MatchingState, batch: PackedBatch, constants: Constants = ()
    ) -> tuple[MatchingState, Metrics]:
        params, step, count = self.get_params(state), state.model.step, self.loss.config.critic_steps

        def improve(critic, index):
            current = params | {"critic": critic.params}
            (value, _), gradients = self._differentiate("critic", current, batch, step * count + index, *constants)
            updates, opt_state = self.optimizer.update(gradients, critic.opt_state, critic.params)
            next_critic = CriticState(params=optax.apply_updates(critic.params, updates), opt_state=opt_state)
            return with_student_learning_rate(next_critic, state.model), value

        critic = with_student_learning_rate(state.critic, state.model)
        critic, losses = jax.lax.scan(improve, critic, jnp.arange(count))
        current = params | {"critic": critic.params}
        (value, metrics), gradients = self._differentiate("student", current, batch, step, *constants)
        metrics |= {"loss": value, "gradient_norm": optax.tree.norm(gradients), "critic": losses.mean()}
        model = apply_updates(state.model, gradients, self.optimizer, ema_decay=self.ema_decay)
        return finish_step(state, MatchingState(model=model, critic=critic), batch, metrics, "critic")

    def _compute_loss(self, params, rows, step, teacher):
        models = self.make_params(params, teacher)
        return self.loss(models["student"], models["critic"], rows, step, teacher)

    def _compute_critic_loss(self, params, rows, step, teacher):
        models = self.make_params(params, teacher)
        return self.loss.critic_loss(models["critic"], models["student"], rows, step), {}
