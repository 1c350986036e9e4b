"""Silent faults of the objective: noise, targets, times, the loss's mean and the dropout of captions."""

import sys

import jax.numpy as jnp
import numpy as np
from experiment.self_check.faults_injection import Catalogue, replace_function, replace_method
from experiment.self_check.variants import COUNT, HELD_OUT
from jax.scipy.stats import norm

from dit_video.diffusion import LogitNormal, RectifiedFlow, Velocity
from dit_video.diffusion.time_distributions import TimeDistribution
from dit_video.experiment.denoiser import get_time_range
from dit_video.tokens import PackedRows
from dit_video.training.losses.denoiser import DenoiserLoss

FAULTS = Catalogue("objective")
CLIPS = COUNT - HELD_OUT
_losses = sys.modules["dit_video.training.losses.denoiser"]
_denoiser = sys.modules["dit_video.experiment.denoiser"]


def _change_keys(purpose, change):
    """Let the loss draw random numbers of a purpose from other keys; `change` gets step and examples."""
    make_key, make_keys, last = _losses.key, _losses.example_keys, [""]

    def make_noted_key(seed, name):
        last[0] = name
        return make_key(seed, name)

    def make_changed_keys(purpose_key, step, examples):
        return make_keys(purpose_key, *(change(step, examples) if last[0] == purpose else (step, examples)))

    _losses.key, _losses.example_keys = make_noted_key, make_changed_keys


@FAULTS.add("The noise of an example is the same in every epoch and step: a key that is not folded in.", "noise")
def noise_of_first_step(run):
    _change_keys("noise", lambda step, examples: (0, examples % CLIPS))


@FAULTS.add("All clips of a batch have the same noise.", "noise")
def noise_of_one_clip(run):
    _change_keys("noise", lambda step, examples: (step, jnp.zeros_like(examples)))


@FAULTS.add("The noise has half of its standard deviation.", "noise")
def noise_too_weak(run):
    replace_method(PackedRows, "sample_noise", lambda sample: lambda self, *rest: 0.5 * sample(self, *rest))


@FAULTS.add("The noise is uniform instead of normal, with the same variance.", "noise")
def noise_uniform(run):
    def make(sample):
        return lambda self, *rest: 12**0.5 * (norm.cdf(sample(self, *rest)) - 0.5)

    replace_method(PackedRows, "sample_noise", make)


@FAULTS.add(
    "The sign of the target is flipped: data minus noise, which the samplers take for noise minus data.", "objective"
)
def target_negated(run):
    replace_method(Velocity, "target", lambda target: lambda self, *rest: -target(self, *rest))


@FAULTS.add("Noise is added as if time ran from noise to data, while the model gets it as it is.", "objective")
def time_reversed_in_noising(run):
    RectifiedFlow.add_noise = lambda self, data, noise, time: time * data + (1 - time) * noise


@FAULTS.add("The target is the noise, while the samplers read the prediction as a velocity.", "objective")
def target_of_other_prediction(run):
    Velocity.target = lambda self, process, data, noise, time: noise


@FAULTS.add("Times are uniform where the config says logit-normal.", "times")
def times_uniform(run):
    LogitNormal.quantile = lambda self, u: u


@FAULTS.add("The shift applies to sampling only, and is missing in training.", "times")
def shift_missing(run):
    TimeDistribution.__call__ = lambda self, process, u, size=None: self.quantile(u)


@FAULTS.add("One time is drawn for a whole batch, instead of one for each clip.", "times")
def time_of_batch(run):
    draw = _losses.draw_low_discrepancy
    replace_function(draw, lambda offset, ranks: draw(offset, jnp.zeros_like(jnp.asarray(ranks))))


@FAULTS.add(
    "The high-noise expert is trained at the low-noise times (Wan-Video/Wan2.2 #47, kohya-ss/musubi-tuner #491).",
    "times",
    variant="expert",
)
def expert_at_other_times(run):
    original = get_time_range

    def get_other_range(training, model):
        first, last = original(training, model)
        return (0.0, first) if last == 1 else (last, 1.0)

    replace_function(original, get_other_range)


@FAULTS.add(
    "The boundary of the experts, a time, is taken for a share of the training times.", "times", variant="expert"
)
def expert_boundary_as_quantile(run):
    def get_range(training, model):
        boundary = training.expert.boundary
        return (boundary, 1.0) if training.expert.expert == "high" else (0.0, boundary)

    replace_function(get_time_range, get_range)


@FAULTS.add("The loss is averaged over tokens, so that long clips count more than short ones.", "loss_mean")
def loss_over_tokens(run):
    average = _losses.segment_mean

    def average_tokens(values, segments, *, count):
        sizes = (segments[..., None] == jnp.arange(1, count + 1)).sum(axis=1)
        return average(values, segments, count=count) * sizes * (sizes > 0).sum() / jnp.maximum(sizes.sum(), 1)

    _losses.segment_mean = average_tokens


@FAULTS.add("Padding counts in the loss, with its zeros.", *("loss_mean", "padding"))
def loss_of_padding(run):
    def average_all(values, segments, *, count):
        return jnp.broadcast_to(values.mean(), (values.shape[0], count))

    _losses.segment_mean = average_all


def _change_loss(**change):
    """Let the denoiser's loss be made with other values than those of the config."""

    def make_loss(**options):
        return DenoiserLoss(**options | {name: make(options[name]) for name, make in change.items()})

    _denoiser.DenoiserLoss = make_loss


@FAULTS.add("No caption is dropped, so that guidance compares with a branch that was never trained.", "caption_dropout")
def captions_never_dropped(run):
    _change_loss(caption_dropout=lambda _: 0.0)


@FAULTS.add("All captions are dropped: a comparison the wrong way round.", *("caption_dropout", "text_conditioning"))
def captions_always_dropped(run):
    _change_loss(caption_dropout=lambda _: 1.0)


@FAULTS.add(
    "Captions are dropped three times as often: in the data set, the collation and the loss.", "caption_dropout"
)
def captions_dropped_thrice(run):
    _change_loss(caption_dropout=lambda share: 1 - (1 - share) ** 3)


@FAULTS.add(
    "A dropped caption is zeros, while sampling embeds an empty text for the unconditional branch.",
    "caption_dropout",
    variant="frozen text",
)
def empty_caption_of_zeros(run):
    _change_loss(empty_caption=np.zeros_like)
