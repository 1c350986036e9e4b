"""Train with samples on eight devices, and compare these with one device; the argument is a folder of clips.

First all weights are trained, then adapters to them. While it samples, a device holds its share of the average and no
copy of the model.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

import dit_video
from dit_video.distributed import Parallelism
from dit_video.experiment import Experiment, LoraAdapters
from dit_video.experiment.monitors import tile_clips
from dit_video.experiment.run import Run
from dit_video.models.backbones.dit import DiTConfig
from dit_video.nn import LoraConfig
from dit_video.sampling.pipeline import Pipeline, Request
from dit_video.tokens import Grid
from dit_video.training.hooks.metric_logs import MonitoringConfig
from dit_video.video import decode
from support.device_memory import count_bytes
from support.tiny import EXPERIMENT

PROMPTS = ("a red circle", "a blue square")
STEPS = 4


def make_experiment() -> Experiment:
    """Return the tiny experiment with a larger denoiser, on a mesh of eight devices."""
    backbone = DiTConfig(channels=4, context_width=16, patch=Grid(1, 2, 2), width=96, layers=2, heads=4)
    return replace(
        EXPERIMENT.replace_model(backbone=backbone).replace_stage("denoiser", batch=4, steps=STEPS),
        parallel=Parallelism(data=2, fsdp=2, context=2),
        monitoring=MonitoringConfig(sample_every=STEPS, prompts=PROMPTS),
    )


def train(folder: Path, clips: Path, experiment: Experiment) -> None:
    """Train, and compare the sample and the memory that it took."""
    before, added = dict[jax.Device, int](), dict[jax.Device, int]()
    real_make, real_decode = Run.make_pipeline, Pipeline.decode_many

    def make_pipeline(*arguments, **options):
        before.update(count_bytes())
        return real_make(*arguments, **options)

    def decode_many(self, *arguments):
        if not added:  # later calls are those of the evaluation
            added.update({device: count - before[device] for device, count in count_bytes().items()})
        return real_decode(self, *arguments)

    Run.make_pipeline, Pipeline.decode_many = make_pipeline, decode_many
    try:
        run = Run.create(folder, experiment)
        run.train(clips)
        trained = run.load_pipeline()
    finally:
        Run.make_pipeline, Pipeline.decode_many = real_make, real_decode
    assert trained.denoiser_params["backbone"]["blocks"]["up"]["kernel"].sharding.num_devices == 8
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(trained.denoiser_params))
    autoencoder = sum(leaf.nbytes for leaf in jax.tree.leaves(trained.codec.params))
    print("added", max(added.values()), "weights", weights, "autoencoder", autoencoder)
    assert max(added.values()) < 2 * autoencoder + 0.1 * weights, (added, weights, autoencoder)

    one = dit_video.load(folder)
    requests = [Request(prompt, one.config.size, seed) for seed, prompt in enumerate(PROMPTS)]
    tile_clips(one.generate_many(requests)).save(folder / "expected.mp4")
    actual = decode(folder / "denoiser" / "samples" / f"{STEPS:08}.mp4").frames.astype(int)
    assert actual.std() > 1
    difference = np.abs(actual - decode(folder / "expected.mp4").frames)
    print("difference", difference.mean(), difference.max())
    assert difference.mean() < 0.5  # of 255: video coding of pixels that differ by one


def main() -> None:
    """Train all weights, then adapters."""
    assert jax.device_count() == 8
    clips = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        folder, experiment = Path(temporary), make_experiment()
        train(folder / "all", clips, experiment)
        start = str(folder / "all" / "pipeline")
        lora = LoraConfig(rank=4, alpha=16.0, targets=(r"backbone/blocks/.*kernel$",))
        denoiser = replace(experiment.denoiser, train=LoraAdapters(init_from=start, lora=lora))
        train(folder / "adapters", clips, replace(experiment, stages=(denoiser,), autoencoder_from=start))
    print("done")


if __name__ == "__main__":
    main()
