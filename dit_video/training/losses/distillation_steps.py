"""Steps of few-step distillation, on the states of a student and, where there is one, of its critic.

A step is a `TrainStep` like that of any other training, so that checkpoints, resuming and logs are shared. The
teacher's parameters are a constant of the step.

Student and critic are trained copies of the teacher, or adapters (LoRA) that are attached to it: then the teacher's
weights are in memory once (LCM-LoRA, arXiv 2311.05556).
"""

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from dit_video.tokens import PackedBatch
from dit_video.training.losses.denoiser import DenoiserLoss
from dit_video.training.losses.distillation import (
    ConsistencyDistillation,
    ConsistencyLoss,
    Distillation,
    MatchingLoss,
)
from dit_video.training.losses.lora import attach_factors
from dit_video.training.optim.ema import EmaConfig
from dit_video.training.state import CompositeState, TrainState
from dit_video.training.step import Constants, Metrics, ModelStep, apply_updates, finish_step


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


@dataclass(frozen=True, kw_only=True)
class _StudentStep(ModelStep):
    """The step of a student, whose trained parameters are a model's, or the factors of an adapter of the teacher."""

    lora_scale: float | None = None
    """Scale of the adapter, alpha / rank; None where the trained parameters are a model's."""

    def make_params(self, trained: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters of a model from its trained ones."""
        return trained if self.lora_scale is None else attach_factors(teacher, trained, self.lora_scale)


@dataclass(frozen=True, kw_only=True)
class ConsistencyStep(_StudentStep):
    """The step of a student of `ConsistencyDistillation`.

    The target network is the moving average that is also sampled from.
    """

    loss: ConsistencyLoss

    def update(self, state: TrainState, batch: PackedBatch, constants: Constants = ()) -> tuple[TrainState, Metrics]:
        (teacher,) = constants
        target = self.make_params(state.ema, teacher)

        def compute_loss(trained):
            return self.loss(self.make_params(trained, teacher), target, batch, state.step, teacher)

        value, gradients = jax.value_and_grad(compute_loss)(state.params)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradients)}
        next_state = apply_updates(state, gradients, self.optimizer, ema_decay=self.ema_decay)
        return finish_step(state, next_state, batch, metrics)


@dataclass(frozen=True, kw_only=True)
class MatchingStep(_StudentStep):
    """The step of a student and its critic, on a `MatchingState`.

    The critic is updated `critic_steps` times, then the student once, with the same optimizer and learning rate. The
    metrics are `loss` (half the squared displacement of samples, which does not converge to a minimum), `critic` (mean
    loss of the critic) and `distance` (of samples from the teacher's estimate of their data).
    """

    loss: MatchingLoss

    def init(self, params: dict[str, Any], *, is_fresh: bool = True) -> MatchingState:
        """Return the state before the first step, with a critic that is initialized from the teacher too."""
        model = super().init(params)
        own = jax.tree.map(jnp.copy, model.params)
        return MatchingState(model=model, critic=CriticState(params=own, opt_state=self.optimizer.init(own)))

    def update(
        self, state: MatchingState, batch: PackedBatch, constants: Constants = ()
    ) -> tuple[MatchingState, Metrics]:
        (teacher,), loss, count = constants, self.loss, self.loss.config.critic_steps
        student, student_step = self.make_params(state.model.params, teacher), state.model.step

        def improve(critic, index):
            critic_step = student_step * count + index
            inputs = loss.draw_student_inputs(student, batch, critic_step)
            samples = jax.lax.stop_gradient(loss.make_consistency_function(student, batch)(*inputs))

            def compute_critic_loss(trained):
                return loss.critic_loss(self.make_params(trained, teacher), samples, batch, critic_step)

            value, gradients = jax.value_and_grad(compute_critic_loss)(critic.params)
            updates, opt_state = self.optimizer.update(gradients, critic.opt_state, critic.params)
            next_critic = CriticState(params=optax.apply_updates(critic.params, updates), opt_state=opt_state)
            return with_student_learning_rate(next_critic, state.model), value

        critic = with_student_learning_rate(state.critic, state.model)
        critic, losses = jax.lax.scan(improve, critic, jnp.arange(count))
        student_inputs = loss.draw_student_inputs(student, batch, student_step, purpose="student ")
        critic_params = self.make_params(critic.params, teacher)

        def compute_loss(trained):
            own = self.make_params(trained, teacher)
            return loss(own, critic_params, student_inputs, batch, student_step, teacher)

        (value, metrics), gradients = jax.value_and_grad(compute_loss, has_aux=True)(state.model.params)
        metrics |= {"loss": value, "gradient_norm": optax.tree.norm(gradients), "critic": losses.mean()}
        model = apply_updates(state.model, gradients, self.optimizer, ema_decay=self.ema_decay)
        return finish_step(state, MatchingState(model=model, critic=critic), batch, metrics, "critic")
