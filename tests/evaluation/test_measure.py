"""Metrics of folders of clips by a protocol, and what is said of clips and weights that are missing."""

import json
import os
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.core.registry import register
from dit_video.evaluation.clip_set import open_clip_set
from dit_video.evaluation.feature_functions import I3dFeatures
from dit_video.evaluation.measure import measure
from dit_video.evaluation.metrics.distributions import FrechetMetric, PrecisionRecall
from dit_video.evaluation.metrics.metric import MeanMetric, MetricDescription
from dit_video.evaluation.metrics.reconstruction import Psnr
from dit_video.evaluation.protocol import ClipSampling, EvaluationProtocol, ReconstructionProtocol
from dit_video.video import Clip
from support.colour_features import ColourFeatures, draw_clips


@register
@dataclass(frozen=True, kw_only=True)
class Brightness(MeanMetric):
    """Mean value of all pixels."""

    needs, name = ("samples",), "brightness"
    description = MetricDescription(label="brightness")

    def measure(self, batch):
        return [float(clip.frames.mean(axis=(0, 1, 2, 3))) for clip in batch.samples]


PROTOCOL = EvaluationProtocol(name="test", metrics=(Psnr(), PrecisionRecall(features=ColourFeatures())))
RECONSTRUCTION = ReconstructionProtocol(name="test", metrics=(Psnr(),))


def write_clips(folder, clips):
    folder.mkdir()
    for number, clip in enumerate(clips):
        replace(clip, frames=clip.frames.repeat(4, axis=1).repeat(4, axis=2)).save(folder / f"{number:03d}.mp4", crf=1)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    return write_clips(root / "a", draw_clips(20, seed=0)), write_clips(root / "b", draw_clips(24, seed=1))


def test_values_are_those_of_the_written_clips(folders, tmp_path):
    protocol = replace(PROTOCOL, metrics=(Brightness(), PrecisionRecall(features=ColourFeatures())))
    samples, real_clips = map(open_clip_set, folders)
    result = measure(samples, protocol, tmp_path, real_clips=real_clips)
    expected = np.mean([samples.read(number, None).frames.mean(axis=(0, 1, 2, 3)) for number in range(20)])
    assert result.results["brightness"].estimate.value == pytest.approx(expected)
    assert result.results["precision"].estimate.count == 20
    assert result.results["recall"].estimate.count == 24
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["protocol"]["weights"] == {"precision, recall": ["mean colours"]}
    assert record["protocol"]["config"]["name"] == "test"
    assert list(record["examples"]) == [f"{number:03d}.mp4" for number in range(20)]
    assert record["examples"]["003.mp4"]["brightness"] == pytest.approx(
        samples.read(3, None).frames.mean(axis=(0, 1, 2, 3))
    )


def test_the_record_names_the_pixels_of_the_data_not_their_folder(folders, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(folders[1], copied)
    digests = []
    for data in (folders[1], copied, folders[0]):
        measure(open_clip_set(folders[0]), PROTOCOL, tmp_path, real_clips=open_clip_set(data))
        digests.append(json.loads((tmp_path / "metrics.json").read_text())["protocol"]["data"])
    assert digests[0] == digests[1] != digests[2]
    assert str(folders[1]) not in (tmp_path / "metrics.json").read_text()


def test_reconstructions_are_compared_with_the_originals_of_their_names(folders, tmp_path):
    protocol = ReconstructionProtocol(name="test", metrics=PROTOCOL.metrics)
    same = measure(open_clip_set(folders[0]), protocol, tmp_path, real_clips=open_clip_set(folders[0]))
    assert same.results["psnr"].estimate.value == 100
    assert same.results["recall"].estimate.value == 1
    fewer = tmp_path / "fewer"
    shutil.copytree(folders[0], fewer)
    (fewer / "007.mp4").unlink()
    with pytest.raises(UserError, match=r"1 of 20 reconstructions have no original.*007\.mp4"):
        measure(open_clip_set(folders[0]), protocol, tmp_path, real_clips=open_clip_set(fewer))


def test_reconstructions_without_originals_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match=r"the protocol test compares clips with their originals.*--data"):
        measure(open_clip_set(folders[0]), RECONSTRUCTION, tmp_path)


def test_metrics_without_weights_or_inputs_are_named_and_the_others_computed(folders, tmp_path):
    missing = FrechetMetric(features=I3dFeatures(weights=str(tmp_path / "i3d.safetensors")), name="fvd", label="FVD")
    protocol = replace(PROTOCOL, metrics=(Brightness(), missing, Psnr()))
    result = measure(open_clip_set(folders[0]), protocol, tmp_path, real_clips=open_clip_set(folders[1]))
    assert set(result.results) == {"brightness"}
    assert "i3d.safetensors" in result.skipped["fvd, fvd_half, fvd_limit"]
    assert "--data" in result.skipped["psnr"]
    with pytest.raises(UserError, match=r"no metric of the protocol test can be computed: fvd.*i3d\.safetensors"):
        measure(
            open_clip_set(folders[0]),
            replace(protocol, metrics=(missing,)),
            tmp_path,
            real_clips=open_clip_set(folders[1]),
        )


def test_all_clips_that_an_error_is_about_are_named_at_once(folders, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(folders[0], damaged)
    for name in ("004.mp4", "011.mp4", "019.mp4"):
        (damaged / name).write_bytes(b"no video")
    with pytest.raises(UserError, match=r"3 of 20 clips.*004\.mp4.*011\.mp4.*019\.mp4"):
        measure(open_clip_set(damaged), replace(PROTOCOL, metrics=(Brightness(),)), tmp_path)


def test_files_that_cannot_be_clips_count_as_unreadable(folders, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(folders[0], copied)
    protocol = replace(PROTOCOL, metrics=(Brightness(),), max_unreadable=0.1)
    assert not measure(open_clip_set(copied), protocol, tmp_path).record["excluded"]
    (copied / "003.txt").write_bytes(b"caf\xe9")
    shutil.copy(copied / "004.mp4", os.fsencode(copied) + b"/caf\xe9.mp4")
    result = measure(open_clip_set(copied), protocol, tmp_path)
    assert result.results["brightness"].estimate.count == 19
    assert {name: "UTF-8" in reason for name, reason in result.record["excluded"][str(copied)].items()} == {
        "003.mp4": True,
        "caf\\udce9.mp4": True,
    }
    unread = measure(open_clip_set(folders[1]), protocol, tmp_path, real_clips=open_clip_set(copied))
    assert len(unread.record["excluded"][str(copied)]) == 2
    with pytest.raises(UserError, match=r"2 of 21 clips.*003\.mp4"):
        measure(open_clip_set(copied), replace(protocol, max_unreadable=0.09), tmp_path)


def test_originals_that_are_unreadable_or_of_another_size_are_left_out(folders, tmp_path):
    originals = tmp_path / "originals"
    shutil.copytree(folders[0], originals)
    (originals / "004.mp4").write_bytes(b"no video")
    Clip(np.zeros((5, 16, 8, 3), np.uint8), fps=8).save(originals / "005.mp4")
    samples, protocol = open_clip_set(folders[0]), replace(RECONSTRUCTION, max_unreadable=0.1)
    result = measure(samples, protocol, tmp_path, real_clips=open_clip_set(originals))
    assert result.results["psnr"].estimate.count == 18
    assert set(result.record["examples"]) == {f"{number:03d}.mp4" for number in range(20)} - {"004.mp4", "005.mp4"}
    assert "16x8 pixels" in result.record["excluded"][str(originals)]["005.mp4"]
    strict = replace(protocol, max_unreadable=0.09)
    with pytest.raises(UserError, match=r"2 of 20 clips.*005\.mp4"):
        measure(samples, strict, tmp_path, real_clips=open_clip_set(originals))


@pytest.mark.parametrize(
    ("listed", "rule"),
    [
        ({}, "no list of samples"),
        ([], "no list of samples"),
        ([1], "entry 0"),
        ([{"file": "000.mp4"}], "entry 0"),
        ([{"file": 5, "prompt": "a"}], "entry 0"),
        ([{"file": "../a/000.mp4", "prompt": "a"}], "another folder"),
        ([{"file": "000.mp4", "prompt": "a"}] * 2, "two samples"),
    ],
)
def test_a_damaged_list_of_samples_is_an_error(tmp_path, listed, rule):
    (tmp_path / "prompts.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=rule):
        open_clip_set(tmp_path)


def test_unreadable_and_short_clips_are_named_and_too_many_are_an_error(folders, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(folders[0], damaged)
    (damaged / "004.mp4").write_bytes(b"no video")
    Clip(np.zeros((1, 16, 16, 3), np.uint8), fps=8).save(damaged / "005.mp4")
    protocol = replace(PROTOCOL, metrics=(Brightness(),), clips=ClipSampling(frames=3), max_unreadable=0.1)
    result = measure(open_clip_set(damaged), protocol, tmp_path)
    assert result.results["brightness"].estimate.count == 18
    excluded = result.record["excluded"][str(damaged)]
    assert set(excluded) == {"004.mp4", "005.mp4"}
    assert "1 frames, 3 are measured" in excluded["005.mp4"]
    with pytest.raises(UserError, match=r"2 of 20 clips.*max_unreadable=0\.01.*004\.mp4"):
        measure(open_clip_set(damaged), replace(protocol, max_unreadable=0.01), tmp_path)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(MissingError, match="no such folder of clips"):
        open_clip_set(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no clips"):
        open_clip_set(tmp_path / "empty")
