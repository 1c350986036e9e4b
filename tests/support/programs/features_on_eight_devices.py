"""Compare features of clips whose batches are shared by eight devices with those of one."""

import jax
import numpy as np
from flax import nnx

from dit_video.evaluation.feature_functions import NetworkInput, make_extractor
from dit_video.nn import get_graph_def
from dit_video.scenes.features import SceneClassifier
from dit_video.video import Clip
from support.random_params import make_random_params


def make(rngs: nnx.Rngs) -> SceneClassifier:
    """Return the network."""
    return SceneClassifier(8, rngs=rngs)


def main() -> None:
    """Check batches that eight divides, and others."""
    assert jax.device_count() == 8
    params, shardings = make_random_params(make), []

    def keep_sharding(model: SceneClassifier, features: jax.Array) -> jax.Array:
        jax.debug.inspect_array_sharding(features, callback=shardings.append)
        return features

    generator = np.random.default_rng(0)
    clips = [Clip(generator.integers(0, 256, (frames, 32, 32, 3), np.uint8), fps=8) for frames in (5, 5, 9) * 5]
    features = make_extractor(make, params, NetworkInput(side=48), batch=4, output=keep_sharding)(clips)
    assert len({device for sharding in shardings for device in sharding.device_set}) == 8
    model, network_input = nnx.merge(get_graph_def(make), params), NetworkInput(side=48)
    for clip, row in zip(clips, features, strict=True):
        expected = model(network_input.interpolate(clip.frames)[None] / 127.5 - 1)
        np.testing.assert_allclose(row, np.asarray(expected)[0], atol=1e-4)
    print("done")


if __name__ == "__main__":
    main()
