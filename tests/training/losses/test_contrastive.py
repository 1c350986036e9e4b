"""Contrastive losses equal their formulas, on one device and on many, and train a joint embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_video.training.losses.contrastive import (
    MAX_SCALE,
    ContrastiveLoss,
    PairFeatures,
    SigmoidLoss,
    SoftmaxLoss,
)
from dit_video.training.step import GradientStep
from support.devices import check_on_eight_devices


def make_features(seed, count=6, width=4, groups=None):
    images, texts = jax.random.normal(jax.random.key(seed), (2, count, width))
    return PairFeatures(images, texts, groups)


def compute(loss, features):
    params = {"towers": features, "pairs": loss.pair_loss.init()}
    return loss(params, None, jnp.int32(0))


def take_params(params, batch):
    return params


def cosine(a, b):
    return np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)


def test_the_softmax_loss_is_the_cross_entropy_both_ways():
    features = make_features(0)
    output = compute(ContrastiveLoss(embed=take_params), features)
    images, texts = np.asarray(features.images), np.asarray(features.texts)
    logits = np.array([[cosine(a, b) / 0.07 for b in texts] for a in images])
    losses = [np.log(np.exp(each).sum(axis=1)) - np.diagonal(each) for each in (logits, logits.T)]
    np.testing.assert_allclose(output.value, np.mean(losses, axis=(0, 1)), rtol=1e-5)
    assert output.details.metrics["accuracy"] == np.mean(logits.argmax(axis=1) == np.arange(6), axis=0)
    assert output.details.num_examples is None  # its batch is not accumulated from parts


def test_the_sigmoid_loss_is_the_sum_over_all_pairs():
    features = make_features(1)
    output = compute(ContrastiveLoss(embed=take_params, pair_loss=SigmoidLoss()), features)
    total = 0.0
    for row, image in enumerate(np.asarray(features.images)):
        for column, text in enumerate(np.asarray(features.texts)):
            sign = 1 if row == column else -1
            total += np.log1p(np.exp(-sign * (10 * cosine(image, text) - 10)))
    np.testing.assert_allclose(output.value, total / 6, rtol=1e-5)


def test_images_of_one_text_are_no_negatives_of_each_other():
    images = jnp.eye(4)[jnp.array([0, 0, 1, 2])]
    loss = ContrastiveLoss(embed=take_params, pair_loss=SigmoidLoss(bias=0.0))
    together = compute(loss, PairFeatures(images, images, jnp.array([7, 7, 8, 9])))
    apart = compute(loss, PairFeatures(images, images))
    assert together.value < apart.value - 1
    assert apart.details.metrics["accuracy"] < 1
    assert together.details.metrics["accuracy"] == 1


def test_the_scale_is_bounded():
    features = make_features(2)
    for log_scale in (np.log(MAX_SCALE), 100.0):
        params = {"towers": features, "pairs": {"log_scale": jnp.float32(log_scale)}}
        output = ContrastiveLoss(embed=take_params)(params, None, jnp.int32(0))
        np.testing.assert_allclose(output.details.metrics["scale"], MAX_SCALE, rtol=1e-5)


@pytest.mark.parametrize("pair_loss", [SoftmaxLoss(), SigmoidLoss()])
def test_training_brings_pairs_together(pair_loss):
    def embed(params, batch):
        return PairFeatures(batch @ params["image"], batch @ params["text"])

    loss = ContrastiveLoss(embed=embed, pair_loss=pair_loss)
    step = GradientStep(loss=loss, optimizer=optax.adam(0.05), ema_decay=0.5)
    towers = dict(zip(("image", "text"), jax.random.normal(jax.random.key(0), (2, 8, 6)), strict=True))
    state, update = step.init({"towers": towers, "pairs": pair_loss.init()}), step.compile()
    losses = []
    for seed in range(60):
        state, metrics = update(state, jax.random.normal(jax.random.key(seed), (8, 8)))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:], axis=0) < 0.5 * losses[0]
    assert metrics["accuracy"] > 0.8


@pytest.mark.slow
def test_features_of_eight_devices_are_compared_with_each_other():
    check_on_eight_devices("contrastive_on_eight_devices.py")
