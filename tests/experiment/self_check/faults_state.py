"""Silent faults of the step and the state: gradients, optimizer, averages, adapters, initial weights and resuming."""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
from experiment.self_check.faults_injection import Catalogue, replace_function, replace_method

from dit_video.core.trees import flatten, map_with_path
from dit_video.experiment.denoiser import get_optimizer_config, init_denoiser
from dit_video.training.losses.denoiser import LoraLoss
from dit_video.training.optim.optimizer import OptimizerConfig
from dit_video.training.step import LossDetails, LossOutput, accumulate_gradients, compute_gradients
from dit_video.training.trainer import Trainer

FAULTS = Catalogue("state")
_step = sys.modules["dit_video.training.step"]
_denoiser = sys.modules["dit_video.experiment.denoiser"]
_lora = sys.modules["dit_video.training.losses.denoiser"]


@FAULTS.add("The average is never updated: the weights that are sampled are the initial ones.", "ema")
def ema_off(run):
    _step.update_ema = lambda ema, params, step, *, decay: ema


@FAULTS.add("The average equals the weights.", "ema")
def ema_equals_params(run):
    _step.update_ema = lambda ema, params, step, *, decay: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


@FAULTS.add("The decay of the average and the share of the new weights are exchanged.", "ema")
def ema_decay_exchanged(run):
    update = _step.update_ema
    _step.update_ema = lambda ema, params, step, *, decay: update(ema, params, step, decay=1 - decay)


def _change_schedule(change):
    make = OptimizerConfig.make_schedule
    OptimizerConfig.make_schedule = lambda config, *, steps: change(make, config, steps)


@FAULTS.add("The learning rate is 0 at all steps.", *("optimizer", "trained_parameters"))
def learning_rate_zero(run):
    _change_schedule(lambda make, config, steps: lambda count: 0.0 * make(config, steps=steps)(count))


@FAULTS.add("The warmup is missing.", "optimizer")
def warmup_missing(run):
    _change_schedule(
        lambda make, config, steps: make(replace(config, schedule=replace(config.schedule, warmup=0)), steps=steps)
    )


@FAULTS.add("The learning rate is a tenth of the config's.", "optimizer")
def learning_rate_divided(run):
    _change_schedule(
        lambda make, config, steps: make(replace(config, learning_rate=config.learning_rate / 10), steps=steps)
    )


@FAULTS.add("The schedule is ten times as long as the run, so that the rate never falls.", "optimizer")
def schedule_too_long(run):
    _change_schedule(lambda make, config, steps: make(config, steps=10 * steps))


def _change_optimizer(**changes):
    """Let the optimizer be made with other values than those of the config."""
    make = OptimizerConfig.make
    OptimizerConfig.make = lambda config, **options: make(replace(config, **changes), **options)


@FAULTS.add("Weight decay pulls biases, norms and tables to zero, too.", "optimizer")
def weight_decay_of_all(run):
    _change_optimizer(weight_decay_patterns=("",))


@FAULTS.add("There is no weight decay.", "optimizer")
def weight_decay_missing(run):
    _change_optimizer(weight_decay=0.0)


@FAULTS.add("Weight decay has the wrong sign: weights grow.", "optimizer")
def weight_decay_negated(run):
    decay = optax.add_decayed_weights
    optax.add_decayed_weights = lambda weight_decay, mask=None: decay(-weight_decay, mask)


@FAULTS.add("Gradients are not clipped.", "optimizer")
def clipping_missing(run):
    _change_optimizer(max_grad_norm=1e9)


@FAULTS.add("Each array's gradient is clipped by its own norm, which changes the direction.", "optimizer")
def clipping_per_array(run):
    def clip_each(max_norm):
        def clip(updates, params=None):
            return jax.tree.map(
                lambda leaf: leaf * jnp.minimum(1, max_norm / (jnp.linalg.norm(leaf.ravel()) + 1e-9)), updates
            )

        return optax.stateless(clip)

    optax.clip_by_global_norm = clip_each


@FAULTS.add("Only the last microbatch's gradients count.", "gradient", variant="muon")
def gradients_of_last_part(run):
    def accumulate(loss, num_parts, params, batch, step, *constants, mesh=None):
        part = jax.tree.map(lambda leaf: leaf[num_parts - 1 :: num_parts], batch)
        return compute_gradients(loss, params, part, step, *constants)

    replace_function(accumulate_gradients, accumulate)


@FAULTS.add("The gradients of microbatches are summed and not averaged.", "gradient", variant="muon")
def gradients_summed(run):
    original = accumulate_gradients

    def accumulate(loss, num_parts, *arguments, mesh=None):
        output, gradients = original(loss, num_parts, *arguments, mesh=mesh)
        return output, jax.tree.map(lambda leaf: num_parts * leaf, gradients)

    replace_function(original, accumulate)


@FAULTS.add(
    "Microbatches are averaged without their numbers of clips, so that those of a poor microbatch count more "
    "(gradient accumulation as in transformers before 4.46).",
    *("gradient", "loss_mean"),
    variant="muon",
)
def microbatches_not_weighted(run):
    original = accumulate_gradients

    def accumulate(loss, *arguments, mesh=None):
        def unweighted(*inner):
            output = loss(*inner)
            return output._replace(details=output.details._replace(num_examples=jnp.float32(1)))

        (value, details), gradients = original(unweighted, *arguments, mesh=mesh)
        return LossOutput(value, LossDetails(details.metrics, details.num_examples)), gradients

    replace_function(original, accumulate)


def _round(tree):
    """Round floating-point arrays to bfloat16, and keep their dtype."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        tree,
    )


def _change_update(change):
    update = _step.apply_updates
    _step.apply_updates = lambda *arguments, **options: change(update(*arguments, **options))


@FAULTS.add("Master weights are in bfloat16, and lose small updates.", *("precision", "optimizer"))
def weights_in_bfloat16(run):
    _change_update(lambda state: state.replace(params=_round(state.params)))


@FAULTS.add("The optimizer's moments are in bfloat16.", *("precision", "optimizer"))
def moments_in_bfloat16(run):
    _change_update(lambda state: state.replace(opt_state=_round(state.opt_state)))


@FAULTS.add("The adapter is not applied in the forward pass.", *("adapter", "trained_parameters"), variant="lora")
def adapter_not_applied(run):
    _lora.attach_factors = lambda params, factors, scale: params


@FAULTS.add("The adapter's scale leaves alpha out, in training but not in its file.", "adapter", variant="lora")
def adapter_scale_wrong(run):
    attach = _lora.attach_factors
    _lora.attach_factors = lambda params, factors, scale: attach(params, factors, 0.25 * scale)


@FAULTS.add("Half of the adapter, `b`, is not trained and stays 0.", *("adapter", "trained_parameters"), variant="lora")
def adapter_half_trained(run):
    def make(call):
        def call_frozen(self, factors, *rest):
            stop = jax.lax.stop_gradient
            return call(
                self, map_with_path(lambda path, leaf: stop(leaf) if path.endswith("/b") else leaf, factors), *rest
            )

        return call_frozen

    replace_method(LoraLoss, "__call__", make)


@FAULTS.add(
    "The initial weights are not loaded, and training begins at random ones.", "initial_weights", variant="finetune"
)
def initial_weights_ignored(run):
    Trainer._shard_loaded_params = lambda self: iter(())


def _change_loaded(change):
    load = _denoiser.load_initial_denoiser

    def load_changed(model, start, placer, key):
        loaded = load(model, start, placer, key)
        fresh = flatten(init_denoiser(model, jax.random.key(1)))
        return map_with_path(lambda path, leaf: fresh[path] if change(path) else leaf, loaded)

    _denoiser.load_initial_denoiser = load_changed


@FAULTS.add(
    "Initial weights whose names do not match are left at random values (`strict=False`).",
    "initial_weights",
    variant="finetune",
)
def initial_weights_partly_loaded(run):
    _change_loaded(lambda path: "/blocks/up/" in path or "/blocks/down/" in path)


@FAULTS.add("The adapted model is random: its weights are not loaded.", "initial_weights", variant="lora")
def adapted_weights_ignored(run):
    _change_loaded(lambda path: path.startswith("backbone/"))


def _change_restored(change):
    def make(restore):
        def restore_changed(self, *arguments, **options):
            state, meta = restore(self, *arguments, **options)
            return change(self, state), meta

        return restore_changed

    replace_method(Trainer, "_restore", make)


@FAULTS.add("A resumed run has fresh moments (NVIDIA-NeMo/Automodel #1630).", "resume", variant="resumed")
def optimizer_reset_at_resume(run):
    _change_restored(lambda self, state: state.replace(opt_state=self.train_step.optimizer.init(state.params)))


@FAULTS.add("A resumed run continues from the averaged weights.", "resume", variant="resumed")
def averages_restored_as_weights(run):
    _change_restored(lambda self, state: state.replace(params=jax.tree.map(jnp.copy, state.ema)))


@FAULTS.add(
    "A resumed run reads the data from the beginning again (kohya-ss/musubi-tuner #776).",
    *("resume", "order"),
    variant="resumed",
)
def data_restarted_at_resume(run):
    replace_method(Trainer, "run", lambda run: lambda self, batches: run(self, lambda start: batches(0)))


@FAULTS.add("A training of the temporal layers changes all of them.", "trained_parameters", variant="temporal")
def spatial_layers_trained(run):
    replace_function(get_optimizer_config, lambda training: training.optimizer)


@FAULTS.add("Biases are left out of the update.", "trained_parameters")
def biases_left_out(run):
    _change_optimizer(frozen=("bias$",))


@FAULTS.add("The text encoder, which is to be trained, gets no updates.", "trained_parameters")
def text_encoder_left_out(run):
    _change_optimizer(frozen=("^text/",))
