"""The preview decoder of the shipped model: its quality and speed, as the command prints them."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import dit_video
from dit_video.data.ingest.engine import ingest
from dit_video.evaluation.metrics.reconstruction import psnr
from dit_video.sampling.pipeline_config import AUTOENCODER, CONFIG, PREVIEW, read_pipeline_config
from dit_video.sampling.preview import load_preview_decoder
from dit_video.scenes import shapes
from dit_video.tokens import Grid

TOOL = "tools/fit_preview_decoder.py"
SHAPES = Path(__file__).resolve().parents[2] / "experiments" / "pretrained" / "shapes"


def test_the_shipped_model_has_a_preview_decoder():
    decoder, model = load_preview_decoder(SHAPES / PREVIEW), read_pipeline_config(SHAPES).model.autoencoder
    assert (decoder.stride, decoder.channels) == (model.stride, model.channels)


@pytest.mark.slow
def test_the_shipped_decoder_shows_other_clips():
    pipeline = dit_video.load(SHAPES)
    values = []
    for index in range(8):
        clip = shapes.render_example(index, seed=1, sizes=(Grid(9, 32, 48),))
        latents = pipeline.encode(clip)
        preview = pipeline.preview_decoder.decode(latents, fps=8).frames
        values.append((psnr(pipeline.decode(latents).frames, preview), psnr(clip.frames, preview)))
    to_decoded, to_clip = np.mean(values, axis=0)
    assert to_decoded > 25
    assert to_clip > 22


@pytest.mark.nightly
def test_the_command_writes_the_decoder_of_a_pipeline(tiny_run, tmp_path, script):
    pipeline = shutil.copytree(tiny_run / "pipeline", tmp_path / "pipeline")
    (pipeline / PREVIEW).unlink(missing_ok=True)
    done = script(TOOL, pipeline, "--data", tiny_run / "data", "--clips", 6, "--held-out", 2)
    assert done.code == 0, done.err
    assert "fitted to 6 clips" in done.out
    assert "on 2 other clips" in done.out
    loaded = dit_video.load(pipeline)
    assert loaded.preview_decoder.channels == loaded.config.model.autoencoder.channels


def test_mistakes_are_one_line(tiny_run, script):
    done = script(TOOL, tiny_run, "--data", tiny_run / "data")
    assert done.code == 2
    assert re.search(r"no folder of a pipeline\. Use one, such as RUN/pipeline", done.err)
    done = script(TOOL, tiny_run / "pipeline", "--data", tiny_run / "data", "--clips", 0)
    assert done.code == 2
    assert "--clips 0 is invalid" in done.err


@pytest.mark.slow
def test_a_decoder_of_the_shipped_autoencoder_is_ten_times_as_fast_with_22_db(tmp_path, process):
    shapes.write_folder(tmp_path / "clips", count=160, seed=3)
    ingest(tmp_path / "clips", tmp_path / "data")
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    for name in (CONFIG, AUTOENCODER):
        shutil.copy(SHAPES / name, pipeline / name)
    # Optimised as for users, whatever the session compiles with.
    done = process(TOOL, pipeline, "--data", tmp_path / "data", XLA_FLAGS="")
    assert done.code == 0, done.err
    assert load_preview_decoder(pipeline / PREVIEW).is_quadratic
    to_decoded, to_clip = map(float, re.findall(r"([\d.]+) dB against", done.out))
    assert to_decoded >= 25
    assert to_clip >= 22
    assert float(re.search(r"([\d.]+) times as fast", done.out)[1]) >= 10
