"""Training an autoencoder and a discriminator against each other: one state, and one step for both.

The autoencoder's gradient has a single backward pass: reconstruction and discriminator are differentiated down to the
decoded pixels, where they are added. What the adaptive weight needs, the gradients of the last layer's kernel, are the
first part of that pass, for each of the two alone; the compiler drops what lies beyond.
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

from dit_video.autoencoders.adversarial import (
    R1,
    Adversarial,
    LeCam,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam,
    r1,
)
from dit_video.core.trees import flatten
from dit_video.nn import graph_of, init_params
from dit_video.training.losses.autoencoder import AutoencoderLoss, Figures
from dit_video.training.state import TrainState, WithModel
from dit_video.training.step import Step, following, make_step, noted, unless_broken, with_constants

_CLIP = 1.0
_BETAS = (0.5, 0.9)
"""Of Adam: little momentum, as the other player moves too (CompVis/taming-transformers)."""
_FIGURES = ("against", "adversarial_weight", "discriminator", "penalty", "verdict_real", "verdict_decoded")


@dataclass
class DiscriminatorState:
    """What a discriminator carries from step to step."""

    params: dict[str, Any]
    opt_state: PyTree
    means: dict[str, Any]
    """LeCam's running means of the verdicts on original and decoded clips"""


@dataclass
class AdversarialState(WithModel):
    """Both players. Checkpoints hold them together, so that a run goes on exactly."""

    model: TrainState
    discriminator: DiscriminatorState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival:
    """The discriminator that an autoencoder is trained against."""

    config: Adversarial
    last_layer: str
    """path of the autoencoder's parameter that makes the pixels"""
    random_key: Array
    """for its own first parameters"""

    def join(self, model: TrainState) -> AdversarialState:
        """A new discriminator beside the state of an autoencoder. Traceable."""
        params = init_params(self.config.make, self.random_key)
        averaged = isinstance(self.config.regulariser, LeCam)
        means = {"real": jnp.zeros(()), "decoded": jnp.zeros(())} if averaged else {}
        own = DiscriminatorState(params=params, opt_state=_optimizer(self.config).init(params), means=means)
        return AdversarialState(model=model, discriminator=own)


def make_adversarial_step(
    loss: AutoencoderLoss,
    optimizer: optax.GradientTransformation,
    rival: Rival,
    *,
    ema_decay: float,
    constants: tuple[PyTree, ...] = (),
) -> Step:
    """`step(state, clips) -> (state, figures)` for an `AdversarialState`, which is donated.

    Both players move at once, from where both stood before the step. Before `config.start` the discriminator rests, and
    the step is that of `make_step`; R1 has a part in every so many steps. The host chooses among the programs of these
    steps. (Convolutions in a branch of one program take 11 times as long on XLA's CPU, measured.)

    The figures are those of the loss, `against` (the autoencoder's loss against the discriminator),
    `adversarial_weight` (the adaptive one times the config's), `discriminator` (its hinge loss), `penalty` (the
    regulariser's part of what it minimises), `verdict_real` and `verdict_decoded` (mean verdicts); they are 0 before
    `config.start`.

    Args:
      loss: of the autoencoder.
      optimizer: of the autoencoder.
      rival: the discriminator.
      ema_decay: of the moving average of the autoencoder's parameters.
      constants: further arguments of the loss; see `make_step`.
    """
    config, count, rest = rival.config, HostCount(), jnp.zeros(())
    alone = make_step(loss, optimizer, ema_decay=ema_decay, constants=constants)
    programs = {
        penalised: with_constants(
            jax.jit(play(loss, optimizer, rival, ema_decay=ema_decay, penalised=penalised), donate_argnums=0), constants
        )
        for penalised in (False, True)
    }

    def step(state, clips):
        number = count(state.step)
        if number >= config.start:
            state, figures = programs[_is_penalised(config, number)](state, clips)
        else:
            model, figures = alone(state.model, clips)
            state = AdversarialState(model=model, discriminator=state.discriminator)
            figures |= dict.fromkeys(_FIGURES, rest)
        count.advance(state.step)
        return state, figures

    return step


class HostCount:
    """A state's step on the host: read from the device once, then counted while each state is the one before's."""

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


def _is_penalised(config: Adversarial, step: int) -> bool:
    return not isinstance(config.regulariser, R1) or step % config.regulariser.every == 0


def play(
    loss: AutoencoderLoss, optimizer: optax.GradientTransformation, rival: Rival, *, ema_decay: float, penalised: bool
) -> Callable[..., tuple[AdversarialState, Figures]]:
    """`(state, clips, *constants) -> (state, figures)`, traceable: a step in which both players move, with or without
    the regulariser's part. Arguments are as for `make_adversarial_step`."""
    return functools.partial(_play, loss, optimizer, rival, ema_decay, penalised)


def _play(
    loss: AutoencoderLoss,
    optimizer: optax.GradientTransformation,
    rival: Rival,
    ema_decay: float,
    penalised: bool,
    state: AdversarialState,
    clips: Any,
    *constants: PyTree,
) -> tuple[AdversarialState, Figures]:
    """A step of both players."""
    config, model, pixels = rival.config, state.model, loss.pixels(clips)

    def decode(params):
        decoded = loss.decode(params, pixels, model.step)
        return (decoded.pixels, decoded.bottleneck.mean()), (decoded.figures, decoded.seen)

    def compare(decoded):
        value, figures = loss.compare(decoded, pixels, *constants)
        return value.mean(), figures

    (decoded, bottleneck), pull_back, (figures, seen) = jax.vjp(decode, model.params, has_aux=True)
    (value, compared), wanted = jax.value_and_grad(compare, has_aux=True)(decoded)

    def at_last_layer(gradient):
        (gradients,) = pull_back((gradient, jnp.zeros_like(bottleneck)))
        return flatten(gradients)[rival.last_layer]

    discriminator, against, played = _move(
        config, state.discriminator, decoded, pixels, wanted, at_last_layer, penalised
    )
    (gradients,) = pull_back((wanted + against, jnp.ones_like(bottleneck)))
    figures = {
        "loss": value + bottleneck + played["adversarial_weight"] * played["against"],
        "gradient_norm": optax.tree.norm(gradients),
        **figures,
        **compared,
        **played,
    }
    model = following(model, gradients, optimizer, ema_decay=ema_decay)
    model, learned = noted(loss, model, seen)
    after = AdversarialState(model=model, discriminator=discriminator)
    return unless_broken(state, after, figures | learned, "discriminator", "penalty")


def _move(
    config: Adversarial,
    state: DiscriminatorState,
    decoded: Float[Array, "B T H W 3"],
    pixels: Float[Array, "B T H W 3"],
    wanted: Float[Array, "B T H W 3"],
    at_last_layer: Callable[[Array], Array],
    penalised: bool,
) -> tuple[DiscriminatorState, Float[Array, "B T H W 3"], Figures]:
    """The discriminator's move, the weighted gradient of the decoded pixels against it, and figures."""
    graph, optimizer = graph_of(config.make), _optimizer(config)

    def judge(params, clips):
        return nnx.merge(graph, params)(clips)

    against, gradient = jax.value_and_grad(lambda clips: generator_loss(judge(state.params, clips)).mean())(decoded)
    weight = config.weight * adaptive_weight(at_last_layer(wanted), at_last_layer(gradient))
    own = functools.partial(_own_loss, config, judge, state.means, decoded, pixels, penalised)
    (_, figures), gradients = jax.value_and_grad(own, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    moved = DiscriminatorState(
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        means=_moved_means(config, state.means, figures),
    )
    return moved, weight * gradient, {"against": against, "adversarial_weight": weight, **figures}


def _own_loss(
    config: Adversarial,
    judge: Callable[[PyTree, Array], Array],
    means: dict[str, Array],
    decoded: Array,
    pixels: Array,
    penalised: bool,
    params: PyTree,
) -> tuple[Float[Array, ""], Figures]:
    """What the discriminator minimises."""
    real, fake = judge(params, pixels), judge(params, decoded)
    match config.regulariser:
        case LeCam(weight=weight):
            penalty = weight * lecam(real, fake, real_mean=means["real"], decoded_mean=means["decoded"]).mean()
        case R1(weight=weight, every=every) if penalised:
            penalty = 0.5 * weight * every * r1(functools.partial(judge, params), pixels).mean()
        case _:
            penalty = jnp.zeros(())
    value = discriminator_loss(real, fake).mean()
    figures = {"discriminator": value, "penalty": penalty, "verdict_real": real.mean(), "verdict_decoded": fake.mean()}
    return value + penalty, figures


def _moved_means(config: Adversarial, means: dict[str, Array], figures: Figures) -> dict[str, Array]:
    if not isinstance(config.regulariser, LeCam):
        return means
    decay = config.regulariser.decay
    return {name: decay * mean + (1 - decay) * figures[f"verdict_{name}"] for name, mean in means.items()}


def _optimizer(config: Adversarial) -> optax.GradientTransformation:
    b1, b2 = _BETAS
    return optax.chain(optax.clip_by_global_norm(_CLIP), optax.adam(config.learning_rate, b1=b1, b2=b2))
