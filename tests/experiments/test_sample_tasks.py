"""`experiments/sample.py RUN TASK`, and lists of tasks."""

import json

import numpy as np
import pytest

import dit_video
from dit_video.core.errors import MissingError, UserError
from dit_video.sampling.tasks import TASKS, Extend, Inpaint, Interpolate
from dit_video.sampling.tasks.fields import list_fields
from dit_video.sampling.tasks.task_file import read_entries, read_task
from dit_video.video import Clip, decode, read_recipe
from support.tiny_wan import write_wan

SAMPLE = "experiments/sample.py"
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)

MASK_RULE = "--mask='a.png' is invalid: no mask has this name, as it could mean what is kept or what is generated"


@pytest.fixture
def clip(tmp_path):
    Clip(FRAMES, 8).save(tmp_path / "clip.apng")
    return tmp_path / "clip.apng"


@pytest.mark.slow
def test_a_task_writes_a_folder_with_a_contact_sheet_and_lines(script, tmp_path, clip):
    write_wan(tmp_path / "wan")
    entries = [{"task": "extend", "prompt": "a dog", "clip": clip.name, "frames": 4, "seed": seed} for seed in range(2)]
    (tmp_path / "tasks.json").write_text(json.dumps(entries))
    options = ("--prompts", tmp_path / "tasks.json", "--steps", 2, "--out", tmp_path / "out")
    done = script(SAMPLE, tmp_path / "wan", *options)
    assert done.code == 0, done.err
    listed = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert [entry["file"] for entry in listed] == ["000-a-dog.mp4", "001-a-dog.mp4"]
    for seed, entry in enumerate(listed):
        assert (entry["prompt"], entry["task"], entry["seed"]) == ("a dog", "extend", seed)
        path = tmp_path / "out" / entry["file"]
        assert len(decode(path).frames) == 9
        recipe = read_recipe(path)
        assert (recipe["seed"], recipe["task"]["name"]) == (seed, "extend")
    sheet = decode(tmp_path / "out" / "contact_sheet.png")
    assert sheet.frames.shape == (1, 36, 108, 3)
    times = [(tmp_path / "out" / entry["file"]).stat().st_mtime_ns for entry in listed]
    assert script(SAMPLE, tmp_path / "wan", *options).code == 0
    assert [(tmp_path / "out" / entry["file"]).stat().st_mtime_ns for entry in listed] == times
    other = script(SAMPLE, tmp_path / "wan", *options[:2], "--steps", 3, *options[4:])
    assert other.code == 2
    assert "holds samples that were made otherwise: settings.sampling.steps is 2 there and 3 here" in " ".join(
        other.err.split()
    )


@pytest.mark.slow
def test_a_task_is_a_subcommand_whose_options_are_its_fields(script, tmp_path, clip):
    write_wan(tmp_path / "wan")
    run = (tmp_path / "wan", "extend", "--clip", clip, "--frames", 4, "--prompt", "a dog", "--steps", 2, "--seed", 3)
    done = script(SAMPLE, *run, "--out", tmp_path / "longer.apng")
    assert done.code == 0, done.err
    pipeline = dit_video.load(tmp_path / "wan")
    expected = pipeline.run(Extend(clip, "a dog", frames=4), steps=2, seed=3)
    np.testing.assert_array_equal(decode(tmp_path / "longer.apng").frames, expected.frames)
    assert read_recipe(tmp_path / "longer.apng") == expected.recipe


@pytest.mark.parametrize("name", TASKS)
def test_the_options_of_a_task_are_the_fields_of_its_class(script, name):
    done = script(SAMPLE, "RUN", name, "--help")
    assert done.code == 0, done.err
    for field in list_fields(TASKS[name]):
        assert f"--{field.name.replace('_', '-')}" in done.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("interpolate", "--out", "out"), "--clip PATH"),
        (("extend", "--clip", "clip.apng", "--frames", "0", "--out", "out"), "frames=0 is invalid"),
        (("extend", "--clip", "none.mp4", "--frames", "4", "--out", "out"), "no such video or image file: none.mp4"),
        (("inpaint", "--clip", "clip.apng", "--mask", "a.png", "--out", "out"), MASK_RULE),
        (("--prompt", "a", "--video", "clip.apng", "--mask=a.png", "--out", "out.gif"), MASK_RULE),
        (("outpaint", "--clip", "clip.apng", "--size", "9x32x32", "--out", "out"), "must be HEIGHTxWIDTH"),
        (("--prompt", "x", "--clip", "clip.apng", "--out", "x.gif"), "--clip"),
        (("vary", "--clip", "clip.apng", "--out", "x.xyz"), "--out x.xyz has no known suffix"),
        (("--prompts", "t.json", "--method", "trained", "--out", "out"), "put them in the list"),
        (("--out", "x.gif"), "exactly one of --prompt, --prompts and the name of a task is needed"),
    ],
)
def test_mistakes_in_a_task_are_named(script, tmp_path, clip, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    done = script(SAMPLE, tmp_path, *options)
    assert done.code == 2
    assert message in " ".join(done.err.split())


def test_lists_of_tasks_are_read_with_their_files(tmp_path, clip):
    mask = np.zeros((1, 16, 16, 3), np.uint8)
    mask[:, 4:8] = 255
    Clip(mask, 1).save(tmp_path / "region.png")
    entries = [
        {"task": "inpaint", "clip": clip.name, "generated": "region.png", "prompt": "b", "seed": 4},
        {"task": "interpolate", "clip": clip.name, "places": [0, 1, 3, 6, 7]},
        {"task": "generate", "size": [5, 16, 16], "conditions": [{"file": clip.name, "frame": 0}], "strength": None},
    ]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    (inpaint, first), (interpolate, second), (generate, _) = read_entries(tmp_path / "a.json")
    assert isinstance(inpaint, Inpaint)
    np.testing.assert_array_equal(inpaint.generated, mask[0, ..., 0] > 0)
    np.testing.assert_array_equal(inpaint.clip.frames, FRAMES)
    assert (inpaint.prompt, first.seed, second.seed) == ("b", 4, 0)
    assert isinstance(interpolate, Interpolate)
    assert interpolate.known_frames == [0, 1, 3, 6, 7]
    assert (generate.size, len(generate.conditions)) == ((5, 16, 16), 1)
    assert read_task({"task": "generate", "conditions": []}, tmp_path).task.conditions == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "fly"}, "task='fly' is unknown; use generate, extend"),
        ({"prompt": "a task of version 2"}, "task=None is unknown; use generate"),
        ({"task": "extend", "frames": 4}, "clip is missing"),
        (
            {"task": "extend", "clip": "clip.apng", "frame": 4},
            r"frame=4 is invalid: extend has no such .* Use frames\.",
        ),
        ({"task": "extend", "clip": "clip.apng", "frames": 4, "seed": "a"}, "seed must be a whole number, not 'a'"),
        ({"task": "extend", "clip": "clip.apng", "frames": "4"}, "frames='4' is invalid: it must be a whole number"),
        ({"task": "extend", "clip": 4, "frames": 4}, "clip=4 is invalid: it must be the name of a file"),
        ({"task": "vary", "clip": "clip.apng", "strength": True}, "strength=True is invalid: it must be a number"),
        ({"task": "generate", "prompt": 4}, "prompt=4 is invalid: it must be a text"),
        ({"task": "loop", "size": [8, 16]}, r"size=\[8, 16\] is invalid: it must be frames, height and"),
        (
            {"task": "inpaint", "clip": "clip.apng", "mask": "m.png"},
            "mask='m.png' is invalid: .* Use generated, white where pixels are generated",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path, clip, values, message):
    with pytest.raises(UserError, match=message):
        read_task(values, tmp_path)
    with pytest.raises(MissingError, match="no such"):
        read_task({"task": "extend", "clip": "other.mp4", "frames": 4}, tmp_path)
