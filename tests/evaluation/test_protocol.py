"""Protocols: frames that are measured, chosen clips, and the refusal to compare different ones."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.evaluation import protocols
from dit_video.evaluation.metrics.frames import Sharpness
from dit_video.evaluation.protocol import ClipSampling, EvaluationProtocol, check_comparable
from dit_video.evaluation.protocols import PROTOCOLS, get_protocol, register_protocol
from dit_video.video import Clip

PROTOCOL = EvaluationProtocol(name="test", metrics=(Sharpness(),))


def make_clip(frames=9, height=8, width=12):
    pixels = np.arange(frames)[:, None, None, None] + np.zeros((frames, height, width, 3))
    return Clip(pixels.astype(np.uint8), fps=8)


def get_numbers(clip):
    return clip.frames[:, 0, 0, 0].tolist()


def test_frames_start_where_the_protocol_says():
    clip = make_clip()
    sample = [
        ClipSampling(frames=3, start=start).sample(clip, seed=0, number=0) for start in ("first", "middle", "random")
    ]
    assert [get_numbers(each) for each in sample[:2]] == [[0, 1, 2], [3, 4, 5]]
    random = [ClipSampling(frames=3, start="random").sample(clip, seed=0, number=number) for number in range(20)]
    starts = {get_numbers(each)[0] for each in random}
    assert len(starts) > 3
    assert starts <= set(range(7))
    again = ClipSampling(frames=3, start="random").sample(clip, seed=0, number=7)
    assert get_numbers(again) == get_numbers(random[7])


def test_resized_clips_keep_the_aspect_ratio_of_their_centre():
    pixels = np.zeros((1, 8, 16, 3), np.uint8)
    pixels[:, :, 4:12] = 200
    resized = ClipSampling(size=(4, 4), filter="box").sample(Clip(pixels, fps=1), seed=0, number=0)
    assert (resized.frames == 200).all(axis=(0, 1, 2, 3))
    own = ClipSampling(size=(8, 16)).sample(Clip(pixels, fps=1), seed=0, number=0)
    np.testing.assert_array_equal(own.frames, pixels)


def test_clips_are_cut_to_multiples():
    cut = ClipSampling(multiple=(4, 4, 8)).sample(make_clip(8, 9, 17), seed=0, number=0)
    assert cut.frames.shape == (5, 8, 16, 3)
    with pytest.raises(UserError, match="less than 16x8"):
        ClipSampling(multiple=(4, 16, 8)).sample(make_clip(), seed=0, number=0)


def test_short_clips_and_empty_sizes_are_refused():
    with pytest.raises(UserError, match="9 frames, 16 are measured"):
        ClipSampling(frames=16).sample(make_clip(), seed=0, number=0)
    for options in ({"size": (0, 4)}, {"frames": -1}, {"multiple": (1, 0, 1)}):
        with pytest.raises(UserError, match="is invalid"):
            ClipSampling(**options)


def test_chosen_clips_are_different_and_a_function_of_the_seed():
    chosen = PROTOCOL.choose(100, 10, purpose="a")
    assert len(set(chosen)) == 10
    assert chosen == sorted(chosen) == PROTOCOL.choose(100, 10, purpose="a")
    assert chosen != replace(PROTOCOL, seed=1).choose(100, 10, purpose="a")
    assert PROTOCOL.choose(3, 10, purpose="a") == [0, 1, 2]


def test_captions_are_repeated_equally_often():
    numbers = replace(PROTOCOL, count=8).repeat_captions(3)
    assert sorted(numbers.count(number) for number in range(3)) == [2, 3, 3]
    assert PROTOCOL.repeat_captions(3) == [0, 1, 2]


def test_different_protocols_are_not_comparable_and_the_field_is_named():
    record = {"config": {"clips": {"frames": 16}, "seed": 0}, "data": "a"}
    check_comparable(record, json.loads(json.dumps(record)), names=("a", "b"))
    other = {"config": {"clips": {"frames": 8}, "seed": 0}, "data": "b"}
    with pytest.raises(UserError, match=r"protocol\.config\.clips\.frames is 16 .* 8 .*protocol\.data is 'a'"):
        check_comparable(record, other, names=("a", "b"))


def test_named_protocols_have_unique_values_and_move_their_weights(tmp_path):
    for name, protocol in PROTOCOLS.items():
        values = [value for metric in protocol.metrics for value in metric.describe()]
        assert len(values) == len(set(values)), name
        assert protocol.name == name
    moved = get_protocol("ucf101", weights=tmp_path)
    assert moved.metrics[0].features.weights == str(tmp_path / "i3d.safetensors")
    lpips = next(
        metric for metric in get_protocol("reconstruction", weights=tmp_path).metrics if hasattr(metric, "weights")
    )
    assert lpips.weights == str(tmp_path / "lpips.safetensors")


def test_a_protocol_keeps_the_chosen_metrics_only():
    chosen = get_protocol("reconstruction", metrics=("ssim", "psnr"), count=3)
    assert [type(metric).__name__ for metric in chosen.metrics] == ["Psnr", "Ssim"]
    assert chosen.count == 3
    with pytest.raises(UserError, match="no such protocol"):
        get_protocol("ucf")
    with pytest.raises(UserError, match=r"metrics='fvd' is invalid.*psnr"):
        get_protocol("reconstruction", metrics=("fvd",))


def test_fields_of_a_protocol_are_given_as_json():
    sampled = get_protocol("ucf101", fields={"crf": None, "codec": "webm"})
    assert (sampled.crf, sampled.codec, sampled.metrics) == (None, "webm", PROTOCOLS["ucf101"].metrics)
    for fields, message in (
        ({"crv": 3}, "has no field crv"),
        ({"split": 3}, "split=3 of EvaluationProtocol is invalid"),
    ):
        with pytest.raises(UserError, match=message):
            get_protocol("ucf101", fields=fields)


def test_a_registered_protocol_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr(protocols, "PROTOCOLS", dict(PROTOCOLS))
    register_protocol(replace(PROTOCOL, name="theirs"))
    assert get_protocol("theirs", count=2) == replace(PROTOCOL, name="theirs", count=2)
