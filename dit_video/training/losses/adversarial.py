"""Adversarial training of an autoencoder against a discriminator: one state and one step for both.

The autoencoder's gradient takes a single backward pass: the reconstruction loss and the generator loss are
differentiated with respect to the decoded pixels, where their gradients are added. The adaptive weight needs the
gradients of the last layer's kernel for each of the two losses; these are the first part of the backward pass, and the
compiler drops the unused remainder.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.struct import dataclass
from jaxtyping import Array, Float, PyTree

from dit_video.core.trees import flatten
from dit_video.models.autoencoders.adversarial import (
    R1,
    AdversarialConfig,
    LeCam,
    compute_adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_loss,
    r1_penalty,
)
from dit_video.models.autoencoders.latent_loss import ScalarMetrics
from dit_video.nn import get_graph_def, init_params
from dit_video.training.losses.autoencoder import AutoencoderStep
from dit_video.training.state import CompositeState, TrainState
from dit_video.training.step import (
    Constants,
    JittedStep,
    Metrics,
    Observe,
    StepFn,
    TrainStep,
    apply_updates,
    finish_step,
)

_MAX_GRAD_NORM = 1.0
_BETAS = (0.5, 0.9)
"""Adam's b1 and b2: low momentum, because the autoencoder changes too (CompVis/taming-transformers)."""
_METRIC_NAMES = ("against", "adversarial_weight", "discriminator", "penalty", "verdict_real", "verdict_decoded")


@dataclass
class DiscriminatorState:
    """Parameters and optimizer state of a discriminator."""

    params: dict[str, Any]
    opt_state: PyTree
    means: dict[str, Any]
    """LeCam's running means of the logits of original and decoded clips; empty without LeCam."""


@dataclass
class AdversarialState(CompositeState):
    """State of the autoencoder and its discriminator, saved in one checkpoint so that a run resumes exactly."""

    model: TrainState
    discriminator: DiscriminatorState


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorTraining:
    """The discriminator that an autoencoder is trained against, before it has parameters."""

    config: AdversarialConfig
    last_layer: str
    """Path of the kernel of the autoencoder's last layer, whose gradients give the adaptive weight."""
    random_key: Array
    """Random key for the discriminator's initial parameters."""

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        b1, b2 = _BETAS
        adam = optax.adam(self.config.learning_rate, b1=b1, b2=b2)
        return optax.chain(optax.clip_by_global_norm(_MAX_GRAD_NORM), adam)

    def init_state(self, model: TrainState) -> AdversarialState:
        """Return the state of an adversarial training that continues from this autoencoder."""
        params = init_params(self.config.make, self.random_key)
        names = ("real", "decoded") if isinstance(self.config.regulariser, LeCam) else ()
        means = {name: jnp.zeros(()) for name in names}
        opt_state = self._optimizer.init(params)
        return AdversarialState(model, DiscriminatorState(params=params, opt_state=opt_state, means=means))

    def update(
        self,
        state: DiscriminatorState,
        decoded: Float[Array, "B T H W 3"],
        pixels: Float[Array, "B T H W 3"],
        *,
        reconstruction_gradient: Float[Array, "B T H W 3"],
        last_layer_gradient: Callable[[Array], Array],
        is_penalised: bool,
    ) -> tuple[DiscriminatorState, Float[Array, "B T H W 3"], ScalarMetrics]:
        """Return the next state, the weighted gradient of the generator's loss with respect to `decoded`, and metrics.

        Both players see the clips that the old parameters decoded.
        """
        config, graph = self.config, get_graph_def(self.config.make)

        def discriminate(params, clips):
            return nnx.merge(graph, params)(clips)

        def compute_generator_loss(clips):
            return generator_loss(discriminate(state.params, clips)).mean()

        def compute_loss(params):
            real, fake, means = discriminate(params, pixels), discriminate(params, decoded), state.means
            match config.regulariser:
                case LeCam(weight=weight):
                    penalty = lecam_loss(real, fake, real_mean=means["real"], fake_mean=means["decoded"])
                    penalty = weight * penalty.mean()
                case R1(weight=weight, every=every) if is_penalised:
                    penalty = r1_penalty(functools.partial(discriminate, params), pixels)
                    penalty = 0.5 * weight * every * penalty.mean()
                case _:
                    penalty = jnp.zeros(())
            value = discriminator_loss(real, fake).mean()
            verdicts = {"verdict_real": real.mean(), "verdict_decoded": fake.mean()}
            return value + penalty, {"discriminator": value, "penalty": penalty, **verdicts}

        value, gradient = jax.value_and_grad(compute_generator_loss)(decoded)
        last_gradients = last_layer_gradient(reconstruction_gradient), last_layer_gradient(gradient)
        weight = config.weight * compute_adaptive_weight(*last_gradients)
        (_, metrics), gradients = jax.value_and_grad(compute_loss, has_aux=True)(state.params)
        updates, opt_state = self._optimizer.update(gradients, state.opt_state, state.params)
        params, means = optax.apply_updates(state.params, updates), state.means
        if isinstance(config.regulariser, LeCam):
            decay = config.regulariser.decay
            means = {name: decay * mean + (1 - decay) * metrics[f"verdict_{name}"] for name, mean in means.items()}
        next_state = DiscriminatorState(params=params, opt_state=opt_state, means=means)
        return next_state, weight * gradient, {"against": value, "adversarial_weight": weight, **metrics}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialStep(TrainStep):
    """The step of an autoencoder and its discriminator, on an `AdversarialState`.

    Autoencoder and discriminator are updated simultaneously, both from their parameters before the step. Before step
    `config.start_step` the discriminator is not updated, and the step is the autoencoder's alone. R1 is applied in
    every `every`-th step only. The host selects the compiled program of a step, because convolutions inside a
    `lax.cond` branch take 11 times as long on XLA's CPU backend (measured).

    The metrics are those of the loss, and `against` (generator loss), `adversarial_weight` (adaptive weight times the
    weight of the config), `discriminator` (hinge loss of the discriminator), `penalty` (weighted penalty of the
    regulariser), `verdict_real` and `verdict_decoded` (mean logits); these are 0 before `config.start_step`.
    """

    autoencoder: AutoencoderStep
    discriminator: DiscriminatorTraining

    def init(self, params: dict[str, Any], *, is_fresh: bool = True) -> AdversarialState:
        return self.discriminator.init_state(self.autoencoder.init(params, is_fresh=is_fresh))

    def compile(self, constants: Constants = (), *, state: Any = None, observe: Observe | None = None) -> StepFn:
        config, count, zero = self.discriminator.config, HostStepCounter(), jnp.zeros(())
        interval = config.regulariser.every if isinstance(config.regulariser, R1) else 1
        plain_step = self.autoencoder.compile(constants, observe=observe)
        updates = {each: functools.partial(self.update, is_penalised=each) for each in (False, True)}
        programs = {each: JittedStep(update, constants, observe) for each, update in updates.items()}

        def step(state, clips):
            number = count(state.step)
            if number >= config.start_step:
                state, metrics = programs[number % interval == 0](state, clips)
            else:
                model, metrics = plain_step(state.model, clips)
                state = state.replace(model=model)
                metrics |= dict.fromkeys(_METRIC_NAMES, zero)
            count.advance(state.step)
            return state, metrics

        return step

    def update(
        self, state: AdversarialState, clips: Any, constants: Constants = (), is_penalised: bool = True
    ) -> tuple[AdversarialState, Metrics]:
        """Return the state after an update of both networks; R1 is part of it if `is_penalised`."""
        step, discriminator = self.autoencoder, self.discriminator
        loss = step.loss
        model, pixels = state.model, loss.to_pixels(clips)

        def decode(params):
            decoded = loss.decode(params, pixels, model.step)
            return (decoded.pixels, decoded.bottleneck.mean()), (decoded.metrics, decoded.auxiliary)

        def compare(decoded):
            value, metrics = loss.compare(decoded, pixels, *constants)
            return value.mean(), metrics

        (decoded, bottleneck), pull_back, (metrics, auxiliary) = jax.vjp(decode, model.params, has_aux=True)
        (value, compare_metrics), reconstruction_gradient = jax.value_and_grad(compare, has_aux=True)(decoded)

        def last_layer_gradient(gradient):
            (gradients,) = pull_back((gradient, jnp.zeros_like(bottleneck)))
            return flatten(gradients)[discriminator.last_layer]

        discriminator_state, generator_gradient, adversarial_metrics = discriminator.update(
            state.discriminator,
            decoded,
            pixels,
            reconstruction_gradient=reconstruction_gradient,
            last_layer_gradient=last_layer_gradient,
            is_penalised=is_penalised,
        )
        (gradients,) = pull_back((reconstruction_gradient + generator_gradient, jnp.ones_like(bottleneck)))
        metrics = {
            "loss": value + bottleneck + adversarial_metrics["adversarial_weight"] * adversarial_metrics["against"],
            "gradient_norm": optax.tree.norm(gradients),
            **metrics,
            **compare_metrics,
            **adversarial_metrics,
        }
        model = apply_updates(model, gradients, step.optimizer, ema_decay=step.ema_decay)
        model, loss_metrics = step.update_extra(model, auxiliary)
        next_state = AdversarialState(model=model, discriminator=discriminator_state)
        return finish_step(state, next_state, clips, metrics | loss_metrics, "discriminator", "penalty")


class HostStepCounter:
    """A host copy of a state's step counter, which avoids a device read in every step.

    The counter is read from the device only if the state is not the one that the previous step returned.
    """

    def __init__(self):
        self._newest: Any = None
        self._number = 0

    def __call__(self, step: Any) -> int:
        if step is not self._newest:
            self._number = int(step)
        return self._number

    def advance(self, step: Any) -> None:
        self._newest = step
        self._number += 1
