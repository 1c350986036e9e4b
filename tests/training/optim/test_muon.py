import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_video.training.optim.muon import orthogonalize, scale_by_muon
from support.jaxprs import list_products
from support.marks import mark_slow_except
from support.rounded_products import MANTISSA_BITS, round_products

DRAW = np.random.default_rng(0)
STEPS = 4


def make_conditioned_matrix(shape, condition):
    """Return a matrix with singular values from 1 to `1 / condition`."""
    left, singular, right = np.linalg.svd(DRAW.normal(size=shape), full_matrices=False)
    return jnp.asarray(left * np.geomspace(1, 1 / condition, singular.shape[-1]) @ right, jnp.float32)


SHAPES = {"long": (96, 12), "wide": (12, 96), "square": (24, 24), "stack": (3, 40, 8), "conv": (3, 3, 3, 8, 16)}
AXES = {
    "conv": optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2, 3), output_axis=4),
    "stack": optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1),
}


def compute_updates(optimizer, gradients):
    """Return the update of every step."""

    @jax.jit
    def run(gradients):
        state, result = optimizer.init(gradients[0]), []
        for gradient in gradients:
            update, state = optimizer.update(gradient, state, gradient)  # without decay, of any parameters
            result.append(update)
        return result

    return run(gradients)


@pytest.mark.nightly
def test_updates_are_those_of_optax():
    gradients = [
        {name: jnp.asarray(DRAW.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
        for _ in range(STEPS)
    ]
    axes = {name: AXES.get(name, optax.contrib.MuonDimensionNumbers()) for name in SHAPES}
    theirs = optax.contrib.muon(-1.0, muon_weight_dimension_numbers=axes, consistent_rms=0.2)
    result, expected = compute_updates(scale_by_muon(0.2), gradients), compute_updates(theirs, gradients)
    for left, right in zip(result, expected, strict=True):
        for name in SHAPES:
            assert jnp.linalg.norm(left[name] - right[name]) < 1e-3 * jnp.linalg.norm(right[name]), name


@pytest.mark.parametrize("shape", [(96, 12), (40, 30), (12, 96)], ids=str)
def test_each_singular_value_follows_the_polynomial_however_small_it_is(shape):
    matrix = make_conditioned_matrix(shape, 1e3)
    left, singular, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    singular = singular / np.linalg.norm(singular)
    for _ in range(5):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    expected = left * singular @ right
    result = jax.jit(orthogonalize)(matrix)
    assert np.linalg.norm(result - expected) < 1e-3 * np.linalg.norm(expected)


def test_orthogonalization_ignores_the_scale_and_maps_zero_to_zero():
    matrix = make_conditioned_matrix((48, 12), 10)
    run = jax.jit(orthogonalize)
    np.testing.assert_allclose(run(1e3 * matrix), run(matrix), atol=1e-4)
    assert not run(jnp.zeros((48, 12))).any()


def make_decaying_matrix(shape, power):
    """Return a matrix with singular values `1 / i**power`."""
    left, singular, right = np.linalg.svd(np.random.default_rng(1).normal(size=shape), full_matrices=False)
    return jnp.asarray(left * np.arange(1.0, len(singular) + 1) ** -power @ right, jnp.float32)


def get_largest_singular_value(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float32), compute_uv=False)[0]


@pytest.mark.nightly
@pytest.mark.parametrize("rounding", MANTISSA_BITS)
@pytest.mark.parametrize(
    "shape", mark_slow_except([(768, 256)], [(768, 256), (256, 256), (256, 768), (1536, 512)]), ids=str
)
def test_singular_values_stay_bounded_where_products_round_their_operands(monkeypatch, shape, rounding):
    for power in (1, 2):
        matrix = make_decaying_matrix(shape, power)
        # The iteration on the Gram matrix, which CPUs compute, would diverge.
        if rounding == "bfloat16" and shape[0] != shape[1]:
            assert get_largest_singular_value(round_products(orthogonalize, rounding)(matrix)) > 50
        with monkeypatch.context() as patched:
            patched.setattr(jax, "default_backend", lambda: "tpu")
            assert get_largest_singular_value(round_products(orthogonalize, rounding)(matrix)) < 1.3
            assert get_largest_singular_value(round_products(orthogonalize, rounding)(jnp.stack([matrix] * 2))[1]) < 1.3


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_multiply_matrices_of_bfloat16(monkeypatch, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    traced = jax.jit(lambda x: orthogonalize(x)).trace(jax.ShapeDtypeStruct((4, 96, 24), jnp.float32))
    products = list_products(traced.lower(lowering_platforms=(platform,)).as_text())
    assert len(products) == 15  # three in each of five iterations, none of them of the Gram form
    assert all(line.count("bf16>") == 2 for line in products), products
