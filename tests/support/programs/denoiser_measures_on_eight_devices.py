"""Measures of a denoiser on a mesh of eight devices, compared with one device."""

import numpy as np

from dit_video.distributed import MeshConfig
from dit_video.evaluation.denoiser_measures import measure_clips
from dit_video.evaluation.metrics.likelihood import DenoisingLoss, LatentLikelihood
from dit_video.sampling.pipeline import Pipeline
from dit_video.video import Clip
from support import tiny_pipeline


def main():
    config = tiny_pipeline.make_config(steps=1)
    params, generator = tiny_pipeline.make_params(config), np.random.default_rng(0)
    clips = [
        Clip(generator.integers(0, 256, (*size, 3)).astype(np.uint8), fps=8.0, caption="a red circle")
        for size in ((9, 16, 32), (9, 16, 16), (5, 16, 16))
    ]
    for function in (DenoisingLoss(times=(0.25, 0.75)), LatentLikelihood(steps=2, probes=1, min_ratio=0.01)):
        one, eight = (
            measure_clips(Pipeline(config, **params, mesh=mesh), clips, function, seed=0)
            for mesh in (None, MeshConfig(data=4, context=2))
        )
        np.testing.assert_allclose(eight, one, rtol=1e-4)
    print("done")


if __name__ == "__main__":
    main()
