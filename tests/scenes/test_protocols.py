"""Protocols on rendered scenes: scenes of every law, samples of captions and of first frames, and their truth."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.evaluation.clip_set import make_file_set
from dit_video.evaluation.evaluate import SAMPLES_FOLDER, evaluate
from dit_video.evaluation.measure import measure
from dit_video.evaluation.protocols import get_protocol
from dit_video.evaluation.samples import SETTINGS_FILE
from dit_video.sampling.pipeline import Pipeline
from dit_video.scenes import render
from dit_video.scenes.laws import LAWS, MIN_FRAMES
from dit_video.scenes.protocols import PHYSICS_METRICS, PhysicsProtocol
from dit_video.tokens import PackedShape
from support import tiny_pipeline
from support.marks import mark_slow_except

NAMES = ("free_fall", "bounce_law", "collision_law", "object_permanence")
COUNT = 8


@pytest.fixture(scope="module")
def pipeline():
    config = tiny_pipeline.make_config(steps=1)
    config = config.replace_model(layout=PackedShape(tokens=1024, text=256, segments=3))
    return tiny_pipeline.make_pipeline(tiny_pipeline.read_captions_of_scenes(config))


@pytest.fixture(scope="module")
def scenes():
    return get_protocol("physics", count=COUNT).make_data(None).clips


def get_shares(measured):
    return {name: result.estimate.value for name, result in measured.results.items()}


def measure_files(clips, scenes, folder):
    """Measure clips as samples of the scenes, from files as a model's."""
    protocol = get_protocol("physics", count=COUNT)
    names = [f"{number:06d}.mp4" for number in range(len(clips))]
    for name, clip in zip(names, clips, strict=True):
        clip.save(folder / name, crf=protocol.crf)
    samples = make_file_set(folder, names, scenes.captions)._replace(truths=scenes.truths)
    return measure(samples, protocol, folder / "out")


def hurry(scene, known):
    """Return a clip of a scene, from its last known frame on three times as fast, which then stands still."""
    fine = replace(scene, size=scene.size._replace(t=2 * scene.size.t))
    times = np.arange(scene.size.t)
    fast = np.where(times < known, times, known - 1 + 3 * (times - known + 1))
    clip = render(fine).clip
    return replace(clip, frames=clip.frames[np.minimum(fast, fine.size.t - 1)])


def test_scenes_are_of_all_laws_with_captions_as_the_data(scenes):
    assert [truth.law for truth in scenes.truths] == [*LAWS, *LAWS]
    assert len({truth.scene for truth in scenes.truths}) == COUNT
    assert list(scenes.captions) == [truth.scene.caption for truth in scenes.truths]
    words = ("that fall,", "that drift and bounce", "that drift and collide", "a grey post in front")
    for number, caption in enumerate(scenes.captions):
        assert words[number % 4] in caption
    again = get_protocol("physics", count=COUNT).make_data(None).clips
    assert again.captions == scenes.captions
    np.testing.assert_array_equal(scenes.read(3, None).frames, render(scenes.truths[3].scene).clip.frames)


def test_true_renderings_keep_all_laws(scenes, tmp_path):
    measured = measure_files([scenes.read(number, None) for number in range(COUNT)], scenes, tmp_path)
    assert get_shares(measured) == dict.fromkeys(NAMES, 1.0)
    assert {result.estimate.count for result in measured.results.values()} == {COUNT // 4}
    # Each sample has the value of its own law alone.
    assert [list(row) for row in measured.record["examples"].values()] == [[name] for name in (*NAMES, *NAMES)]


@pytest.mark.parametrize("known", mark_slow_except([MIN_FRAMES], [1, MIN_FRAMES]))
def test_faster_motion_keeps_no_law_also_after_true_frames(scenes, tmp_path, known):
    measured = measure_files([hurry(truth.scene, known) for truth in scenes.truths], scenes, tmp_path)
    assert get_shares(measured) == dict.fromkeys(NAMES, 0.0)


def test_reversed_falls_do_not_keep_their_law(scenes, tmp_path):
    """Other laws hold in reverse, too."""
    clips = [scenes.read(number, None) for number in range(COUNT)]
    clips = [replace(clip, frames=np.ascontiguousarray(clip.frames[::-1])) for clip in clips]
    assert get_shares(measure_files(clips, scenes, tmp_path)) == dict.fromkeys(NAMES, 1.0) | {"free_fall": 0.0}


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "known"), [("physics", 0), ("physics_extension", MIN_FRAMES)])
def test_a_model_samples_the_scenes(pipeline, tmp_path, monkeypatch, name, known):
    recorded, generate = [], Pipeline.sample_many

    def record(self, requests, **options):
        recorded.extend(requests)
        return generate(self, requests, **options)

    monkeypatch.setattr(Pipeline, "sample_many", record)
    protocol = get_protocol(name, count=4)
    result = evaluate(pipeline, protocol, tmp_path)
    data = protocol.make_data(None).clips
    assert [request.prompt for request in recorded] == list(data.captions)
    assert [request.size for request in recorded] == [truth.scene.size for truth in data.truths]
    for number, request in enumerate(recorded):
        frames = [condition.content.frames for condition in request.conditions]
        assert len(frames) == (known > 0)
        for each in frames:
            np.testing.assert_array_equal(each, data.read(number, None).frames[:known])
    assert list(result.results) == [*NAMES, *(f"{law}_error" for law in LAWS if known)]
    assert {each.estimate.count for each in result.results.values()} == {1}
    settings = json.loads((tmp_path / SAMPLES_FOLDER / SETTINGS_FILE).read_text())
    assert all(("pictures" in request) == (known > 0) for request in settings["requests"])
    if known:
        with pytest.raises(UserError, match=r"made otherwise: .*pictures"):
            evaluate(pipeline, replace(protocol, known=1), tmp_path)


def test_samples_of_another_rate_are_refused(pipeline, tmp_path):
    config = pipeline.config
    faster = tiny_pipeline.make_pipeline(config.replace_model(fps=16.0))
    with pytest.raises(UserError, match=r"fps=16 is invalid: .* have 8 frames per second"):
        evaluate(faster, get_protocol("physics_extension", count=1), tmp_path)


@pytest.mark.parametrize("known", [-1, MIN_FRAMES + 1])
def test_known_frames_end_before_the_contact(known):
    with pytest.raises(UserError, match=rf"known={known} is invalid: .*Use 0 to 5"):
        PhysicsProtocol(name="mine", metrics=PHYSICS_METRICS, known=known)


def test_a_protocol_of_some_laws_is_written_and_drawn():
    protocol = PhysicsProtocol(name="mine", metrics=PHYSICS_METRICS, laws=("bounce", "collision"), count=3)
    assert config_json.from_json(config_json.to_json(protocol)) == protocol
    assert [truth.law for truth in protocol.make_data(None).clips.truths] == ["bounce", "collision", "bounce"]


def test_the_features_of_scenes_keep_the_weights_of_the_package(tmp_path):
    moved = get_protocol("scenes", weights=tmp_path)
    assert moved.metrics == get_protocol("scenes").metrics
