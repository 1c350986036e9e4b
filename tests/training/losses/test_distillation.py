"""Distillation on packed rows, with random parameters. Other tests show on mixtures that a student learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.diffusion import FlowMatching, RectifiedFlow
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.encoders import ByteEncoderConfig, ClassNamesConfig
from dit_video.nn import LoraConfig, get_graph_def, init_lora
from dit_video.tokens import Grid, PackedBatch, PackedExample, PackedShape, compute_positions, pack, stack_rows
from dit_video.training.losses.denoiser import DenoiserLoss
from dit_video.training.losses.distillation import (
    ConsistencyDistillation,
    CriticState,
    DistributionMatching,
    make_distillation_step,
    with_student_learning_rate,
)
from dit_video.training.state import init_state
from dit_video.training.step import get_scalars
from support.random_params import make_random_params

TEXT = ByteEncoderConfig(width=8, layers=1, heads=1, max_tokens=16)
DIT = DiTConfig(channels=1, context_width=8, patch=Grid(1, 2, 2), width=12, layers=1, heads=1, mlp_ratio=2.0)
TOKENIZE = TEXT.make_tokenizer()
SHAPE = PackedShape(tokens=20, text=28, segments=3)
LOSS = DenoiserLoss(
    backbone=get_graph_def(DIT.make),
    text_encoder=get_graph_def(TEXT.make),
    objective=FlowMatching(process=RectifiedFlow(shift=2.0)),
    caption_dropout=0.5,
    empty_caption=TOKENIZE(""),
    seed=3,
)
CONSISTENCY_CONFIG = ConsistencyDistillation(guidance=2.0, intervals=4)
MATCHING_CONFIG = DistributionMatching(guidance=2.0, steps=3, critic_steps=2)
CONSISTENCY, MATCHING = (
    make_distillation_step(config, LOSS, optax.sgd(0.1), ema_decay=0.9).loss
    for config in (CONSISTENCY_CONFIG, MATCHING_CONFIG)
)


def params(seed):
    return {"backbone": make_random_params(DIT.make, seed), "text": make_random_params(TEXT.make, seed)}


TEACHER = params(0)


def item(grid: Grid, caption: str, example: int) -> PackedExample:
    tokens = np.random.default_rng(example).normal(size=(grid.volume, 4)).astype(np.float32)
    return PackedExample(tokens, compute_positions(grid), TOKENIZE(caption), example)


A, B, C = item(Grid(2, 2, 2), "red ball", 5), item(Grid(1, 2, 3), "box", 6), item(Grid(1, 1, 4), "a dot", 7)


def batch(*rows) -> PackedBatch:
    return stack_rows([pack(row, SHAPE, width=4) for row in rows])


@jax.jit
def consistency(student, average, rows, step=0):
    return CONSISTENCY(student, average, rows, jnp.asarray(step), TEACHER)


@jax.jit
def matching(student, critic, rows, step=1):
    """Return the value, the metrics, the student's samples and their times."""
    step = jnp.asarray(step)
    value, metrics = MATCHING(student, critic, rows, step, TEACHER)
    samples = MATCHING.generate(student, rows, step, purpose="student ")
    return value, metrics, samples, MATCHING.draw_time(rows, step)


@pytest.mark.slow
def test_consistency_of_an_example_is_the_same_wherever_it_is_packed():
    alone = [float(consistency(TEACHER, TEACHER, batch([one], []))) for one in (A, B, C)]
    assert min(alone) > 0
    for rows in (batch([A, B], [C]), batch([C], [B, A])):
        assert consistency(TEACHER, TEACHER, rows) == pytest.approx(np.mean(alone), rel=1e-5)
    loud = batch([A, B], [C])
    loud = loud._replace(tokens=np.where((loud.segments == 0)[..., None], 30, loud.tokens).astype(np.float32))
    assert consistency(TEACHER, TEACHER, loud) == consistency(TEACHER, TEACHER, batch([A, B], [C]))


@pytest.mark.slow
def test_invalid_segments_do_not_count():
    rows = batch([A, B], [C])
    without = rows._replace(valid=np.asarray([[True, False, False], [True, False, False]]))
    expected = np.mean([float(consistency(TEACHER, TEACHER, batch([one], []))) for one in (A, C)])
    assert consistency(TEACHER, TEACHER, without) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_critic_equal_to_the_unguided_teacher_gives_zero_loss():
    """Both scores are the same then, for any sample of the student."""
    unguided = dataclasses.replace(MATCHING, config=dataclasses.replace(MATCHING.config, guidance=1.0))
    rows, step = batch([A, B], [C]), jnp.asarray(0)
    student = params(5)

    value, figures = jax.jit(lambda student: unguided(student, TEACHER, rows, step, TEACHER))(student)
    assert value == pytest.approx(0, abs=1e-9)
    assert figures["distance"] > 0.1
    assert matching(student, TEACHER, rows)[0] > 0  # the guided teacher differs


@pytest.mark.slow
def test_matching_of_an_example_is_the_same_wherever_it_is_packed():
    student, critic = params(5), params(6)
    alone = [matching(student, critic, batch([one], [])) for one in (A, B, C)]
    for rows in (batch([A, B], [C]), batch([C], [B, A])):
        value, _, samples, time = matching(student, critic, rows)
        assert value == pytest.approx(np.mean([float(one[0]) for one in alone]), rel=1e-4)
        np.testing.assert_allclose(time, float(alone[0][3][0, 0, 0]))
        assert np.isfinite(samples).all()


@pytest.mark.slow
def test_the_student_is_trained_at_all_its_sampling_times():
    times = {round(float(MATCHING.draw_time(batch([A], []), jnp.asarray(step)).max()), 4) for step in range(20)}
    assert times == {1.0, 0.8, 0.5}  # thirds, shifted by 2


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONSISTENCY_CONFIG, MATCHING_CONFIG], ids=["consistency", "matching"])
def test_a_step_moves_the_players_alone_and_repeats(config):
    train_step = make_distillation_step(config, LOSS, optax.adam(1e-2), ema_decay=0.9)

    def begin():
        return train_step.init(jax.tree.map(jnp.array, TEACHER))

    step = train_step.compile((TEACHER,))
    rows = batch([A, B], [C])
    first, figures = step(begin(), rows)
    assert int(first.step) == 1
    assert all(np.isfinite(value) for value in get_scalars(figures).values())
    again, _ = step(begin(), rows)
    for left, right in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(left, right)
    players = [first.model.params, first.critic.params] if config is MATCHING_CONFIG else [first.params]
    for moved in players:
        changed = [path for path, leaf in flatten(moved).items() if (leaf != flatten(TEACHER)[path]).any()]
        assert {"backbone", "text"} == {path.split("/")[0] for path in changed}
    assert any((leaf != flatten(TEACHER)[path]).any() for path, leaf in flatten(first.ema).items())
    second, _ = step(first, rows)
    assert int(second.step) == 2


@pytest.mark.parametrize(
    ("config", "copies"),
    [
        pytest.param(config, copies, marks=pytest.mark.slow)
        for config, copies in ((CONSISTENCY_CONFIG, 4), (MATCHING_CONFIG, 7))
    ],
    ids=["consistency", "matching"],
)
def test_adapters_learn_on_the_teachers_weights_of_which_there_is_no_copy(config, copies):
    """The state holds the factors as parameters, their average and two moments; a critic has no average."""
    lora = LoraConfig(rank=2, alpha=4.0, targets=(r"^backbone/blocks/.*kernel$",))
    options = {"ema_decay": 0.9, "lora_scale": lora.scale}
    train_step = make_distillation_step(config, LOSS, optax.adam(1e-2), **options)
    teacher, rows = jax.tree.map(jnp.array, TEACHER), batch([A, B], [C])
    state = train_step.init(init_lora(teacher, lora, jax.random.key(0)))
    step, losses = train_step.compile((teacher,)), []
    for _ in range(2):
        state, metrics = step(state, rows)
        losses.append(float(metrics["loss"]))
        assert metrics["gradient_norm"] > 0
    if config is CONSISTENCY_CONFIG:  # fresh factors change nothing
        assert losses[0] == pytest.approx(float(consistency(TEACHER, TEACHER, rows)), rel=1e-5)
    jax.tree.map(np.testing.assert_array_equal, teacher, TEACHER)
    factors = flatten(state.params)
    assert {path.rsplit("/", 2)[1] for path in factors} == {"kernel"}
    trained = [state.model.params, state.critic.params] if config is MATCHING_CONFIG else [state.params]
    for player in trained:
        assert all(np.abs(leaf).max() > 0 for path, leaf in flatten(player).items() if path.endswith("/b"))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert num_bytes <= copies * sum(leaf.nbytes for leaf in factors.values()) + 32  # and a few counters


def test_options_out_of_range_are_refused():
    for make, message in (
        (lambda: ConsistencyDistillation(intervals=0), "1 interval or more"),
        (lambda: ConsistencyDistillation(width=0.0), "positive width"),
        (lambda: DistributionMatching(steps=0), "must be at least 1"),
        (lambda: DistributionMatching(critic_steps=0), "must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            make()


@pytest.mark.slow
def test_distillation_conditions_on_classes():
    text = ClassNamesConfig(classes=3)
    backbone = dataclasses.replace(DIT, context_width=0, classes=3)
    empty = text.make_tokenizer()("")
    graphs = {"backbone": get_graph_def(backbone.make), "text_encoder": get_graph_def(text.make)}
    denoiser = dataclasses.replace(CONSISTENCY.denoiser, **graphs, empty_caption=empty)
    loss = dataclasses.replace(CONSISTENCY, denoiser=denoiser)
    weights = {"backbone": make_random_params(backbone.make), "text": {}}

    def prediction(label, *, silent=False):
        clip = A._replace(text=text.make_tokenizer()(label))
        rows = batch([clip])
        denoise = loss.make_denoise(weights, rows, unconditional=silent)
        return denoise(jnp.asarray(rows.tokens), jnp.ones((1, 1, 1)), None)[0]

    none = prediction("")
    assert min(np.abs(prediction(label) - other).max() for label, other in (("0", none), ("0", prediction("1")))) > 1e-3
    np.testing.assert_allclose(prediction("0", silent=True), none, atol=1e-6)


def test_the_learning_rate_of_the_critic_follows_the_students_steps():
    """The critic takes more steps, and by its own count the schedule would end too early."""
    optimizer, gradients = optax.adamw(lambda step: 1 / (1 + step), weight_decay=0), {"x": jnp.ones(3)}
    student = init_state({"x": jnp.zeros(3)}, optimizer)
    for _ in range(3):
        student = student.replace(opt_state=optimizer.update(gradients, student.opt_state, student.params)[1])
    critic = CriticState(params=student.params, opt_state=optimizer.init(student.params))
    for rate in (1, 1 / 4):
        updates, _ = optimizer.update(gradients, critic.opt_state, critic.params)
        np.testing.assert_allclose(updates["x"], -rate, rtol=1e-4)
        critic = with_student_learning_rate(critic, student)


@pytest.mark.slow
def test_the_critic_keeps_the_learning_rate_within_its_steps():
    rows = batch([A, B], [C])
    critics = []
    for rate in (1e-2, lambda step: jnp.where(step < 1, 1e-2, 0.0)):
        step = make_distillation_step(MATCHING_CONFIG, LOSS, optax.adamw(rate), ema_decay=0.9)
        after, _ = step.compile((TEACHER,))(step.init(jax.tree.map(jnp.array, TEACHER)), rows)
        critics.append(after.critic.params)
    jax.tree.map(np.testing.assert_array_equal, *critics)
    assert any((left != right).any() for left, right in zip(*map(jax.tree.leaves, (critics[0], TEACHER)), strict=True))
