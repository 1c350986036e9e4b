"""The stage `nightly` checks the arguments and results of our functions, with the shapes and dtypes of arrays."""

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dit_video.scenes.law_metrics import fit_contact

SECONDS, CENTRES = np.zeros(4), np.zeros((4, 2, 2))


@pytest.fixture(autouse=True)
def _is_checked(pytestconfig) -> None:
    """Skip without the checks, as the other stages run."""
    if not pytestconfig.getoption("--jaxtyping-packages"):
        pytest.skip("needs --jaxtyping-packages")


@pytest.mark.parametrize(
    ("seconds", "centres"),
    [
        (SECONDS[:3], CENTRES),  # another number of frames
        (SECONDS, CENTRES[..., 0]),
        (SECONDS.astype(int), CENTRES),
        ("0.1", CENTRES),
    ],
    ids=["length", "rank", "dtype", "class"],
)
def test_an_argument_of_another_shape_or_type_is_an_error(seconds, centres):
    fit_contact(SECONDS, CENTRES)
    with pytest.raises(TypeCheckError, match=r"type-check|Type-check"):
        fit_contact(seconds, centres)
