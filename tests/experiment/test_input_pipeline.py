"""Invalid batches of the denoiser are refused before the autoencoder is trained."""

import dataclasses
import shutil

import pytest

from dit_video.core.errors import UserError
from dit_video.data.buckets import BatchMemory, BucketConfig
from dit_video.data.captions import TokenizedCaptions
from dit_video.data.latents.cache import LatentSource
from dit_video.experiment import input_pipeline
from dit_video.experiment.run import Run
from dit_video.scenes import shapes
from support.fakes import tokenize


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"buckets": BucketConfig(memory=BatchMemory(fixed=1, per_token=10), budget=12)},
            "takes .* bytes, but the budget is 12",
        ),
        ({"batch": 3}, "a batch of 3 rows does not divide among 2 devices"),
    ],
)
def test_invalid_batches_of_the_denoiser_are_refused_before_any_training(
    tiny, tiny_clips, tmp_path, monkeypatch, changes, message
):
    data = dataclasses.replace(tiny.EXPERIMENT.data, cache_latents=False)
    experiment = dataclasses.replace(tiny.EXPERIMENT, data=data).replace_stage("denoiser", **changes)
    monkeypatch.setattr(input_pipeline, "count_row_shards", lambda mesh: 2 if "batch" in changes else 1)
    started = Run.create(tmp_path / "run", experiment)
    with pytest.raises(UserError, match=message):
        started.train(tiny_clips)
    assert not (tmp_path / "run" / "autoencoder").exists()


def test_a_data_set_without_training_clips_is_refused_before_any_training(tiny, tiny_clips, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(tiny_clips, tmp_path / name)
    every = tuple(f"two/{shapes.get_file_name(index, seed=0, sizes=tiny.SIZES)}" for index in range(tiny.COUNT))
    data = dataclasses.replace(tiny.EXPERIMENT.data, held_out=every, weights=(1.0, 3.0))
    started = Run.create(tmp_path / "run", dataclasses.replace(tiny.EXPERIMENT, data=data))
    with pytest.raises(UserError, match="sources with at least one clip each"):
        started.train(tmp_path / "one", tmp_path / "two")
    assert not (tmp_path / "run" / "autoencoder").exists()
    for weights in ((1.0, -1.0), (0.0, 0.0), (1.0, float("inf"))):
        with pytest.raises(UserError, match="must not be negative, and one must be positive"):
            dataclasses.replace(tiny.EXPERIMENT, data=dataclasses.replace(data, weights=weights))


def test_positions_of_rows_count_the_seconds_of_each_clip(tiny, tiny_run):
    """The clips have 8 frames a second, and a latent frame stands for 4 of them."""
    latents = LatentSource(tiny_run / "latents")
    run = Run(folder=tiny_run, experiment=tiny.EXPERIMENT.replace_backbone(time_coordinate="seconds"))
    captions = TokenizedCaptions(latents.all_captions, tokenize)
    source = input_pipeline.make_latent_examples(run, latents, captions)
    rows = input_pipeline.open_rows(run, run.experiment.denoiser, source, run.training_clips)(0)
    result = {time for _ in range(4) for time in next(rows).positions[..., 0].flat}
    rows.close()
    assert result == {0.0, 0.5, 1.0}
