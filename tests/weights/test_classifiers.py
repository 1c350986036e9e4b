"""Files of the networks that classify; `tests/features/test_classifiers_parity.py` compares the networks themselves."""

import numpy as np
import pytest

from dit_video.core import trees
from dit_video.core.errors import MissingError, UserError
from dit_video.models.features.convolutional import C3d
from dit_video.nn import get_param_shapes
from dit_video.weights.feature_networks import load_c3d, make_c3d_tensor_map
from dit_video.weights.streaming import FileMap


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the paths of C3D's weights, which hold their number at each name, and of its mean clip."""
    folder = tmp_path_factory.mktemp("c3d")
    shapes = FileMap.from_tensor_map(make_c3d_tensor_map()).compute_shapes(
        get_param_shapes(lambda rngs: C3d(rngs=rngs))
    )
    arrays = {name: np.full(shape, number, np.float16) for number, (name, shape) in enumerate(shapes.items())}
    arrays.pop("mean")
    np.savez(folder / "c3d.npz", **arrays, unused=np.zeros(3))
    np.savez(folder / "mean2.npz", mean=np.arange(3 * 16 * 128 * 171, dtype=np.float32).reshape(1, 3, 16, 128, 171))
    return folder / "c3d.npz", folder / "mean2.npz", arrays


@pytest.mark.slow
def test_parameters_are_those_of_the_names_in_float32_and_the_mean_its_middle(files):
    path, mean, arrays = files
    params = trees.flatten(load_c3d(path, mean=mean))
    for name, mapping in make_c3d_tensor_map().items():
        assert params[name].dtype == np.float32
        if name != "mean":
            np.testing.assert_array_equal(params[name], mapping.to_ours(arrays[mapping.name]))
    stored = np.load(mean)["mean"][0]
    np.testing.assert_array_equal(params["mean"], np.moveaxis(stored[:, :, 8:120, 8:120], 0, -1))


@pytest.mark.slow
def test_files_of_other_networks_are_refused_with_the_names(files, tmp_path):
    path, mean, arrays = files
    np.savez(tmp_path / "few.npz", **{name: each for name, each in arrays.items() if name != "fc7/W"})
    np.savez(tmp_path / "wide.npz", **arrays | {"fc8/b": np.zeros(7)})
    np.savez(tmp_path / "mean.npz", mean=np.zeros((3, 16, 112, 112)))
    (tmp_path / "torn.npz").write_bytes(path.read_bytes()[:-100])
    for name, message in (("few", r"few\.npz.*1 missing \(fc7/W"), ("wide", r"fc8/b \[7\] instead of \[101\]")):
        with pytest.raises(UserError, match=message):
            load_c3d(tmp_path / f"{name}.npz", mean=mean)
    with pytest.raises(UserError, match=r"mean\.npz is no mean clip.*112, 112"):
        load_c3d(path, mean=tmp_path / "mean.npz")
    with pytest.raises(UserError, match=r"torn\.npz is damaged"):
        load_c3d(tmp_path / "torn.npz", mean=mean)
    with pytest.raises(MissingError, match="nowhere"):
        load_c3d(tmp_path / "nowhere.npz", mean=mean)
