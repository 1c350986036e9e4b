"""`experiments/sample.py RUN TASK`, and lists of tasks."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import dit_video
from dit_video.core.errors import MissingError, UserError
from dit_video.evaluation import task_results
from dit_video.evaluation.task_results import make_contact_sheet, write_task_results
from dit_video.sampling.request import Request
from dit_video.sampling.tasks import TASKS, Extend, Inpaint, Interpolate
from dit_video.sampling.tasks.fields import list_fields
from dit_video.sampling.tasks.task_file import TaskEntry, read_task, read_tasks
from dit_video.video import Clip, decode, read_recipe
from support.tiny_wan import write_wan

SAMPLE = "experiments/sample.py"
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def clip(tmp_path):
    Clip(FRAMES, 8).save(tmp_path / "clip.apng")
    return tmp_path / "clip.apng"


@pytest.mark.slow
def test_a_task_writes_a_folder_with_a_contact_sheet_and_lines(script, tmp_path, clip):
    write_wan(tmp_path / "wan")
    entries = [{"task": "extend", "prompt": "a dog", "clip": clip.name, "frames": 4, "seed": seed} for seed in range(2)]
    (tmp_path / "tasks.json").write_text(json.dumps(entries))
    options = ("--tasks", tmp_path / "tasks.json", "--steps", 2, "--out", tmp_path / "out")
    done = script(SAMPLE, tmp_path / "wan", *options)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["000-a-dog.mp4", "001-a-dog.mp4"]
    for seed, line in enumerate(lines):
        path = tmp_path / "out" / line["file"]
        assert len(decode(path).frames) == line["frames"] == 9
        assert line["recipe"]["seed"] == seed
        assert line["recipe"]["task"]["name"] == "extend"
        assert read_recipe(path) == line["recipe"]
    sheet = decode(tmp_path / "out" / "contact_sheet.png")
    assert sheet.frames.shape == (1, 36, 108, 3)
    again = script(SAMPLE, tmp_path / "wan", *options)
    assert again.code == 2
    assert "is not an empty folder" in again.err


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
        (("inpaint", "--clip", "clip.apng", "--mask", "a.png", "--out", "out"), "--mask"),
        (("outpaint", "--clip", "clip.apng", "--size", "9x32x32", "--out", "out"), "must be HEIGHTxWIDTH"),
        (("--prompt", "x", "--clip", "clip.apng", "--out", "x.gif"), "--clip"),
        (("vary", "--clip", "clip.apng", "--out", "x.xyz"), "--out x.xyz has no known suffix"),
        (("--tasks", "t.json", "--seed", "4", "--out", "out"), "put them in the list"),
        (("--out", "x.gif"), "exactly one of --prompt, --prompts, --tasks and the name of a task is needed"),
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
    (inpaint, seed), (interpolate, other_seed), (generate, _) = read_tasks(tmp_path / "a.json")
    assert isinstance(inpaint, Inpaint)
    np.testing.assert_array_equal(inpaint.generated, mask[0, ..., 0] > 0)
    np.testing.assert_array_equal(inpaint.clip.frames, FRAMES)
    assert (inpaint.prompt, seed, other_seed) == ("b", 4, 0)
    assert isinstance(interpolate, Interpolate)
    assert interpolate.known_frames == [0, 1, 3, 6, 7]
    assert (generate.size, len(generate.conditions)) == ((5, 16, 16), 1)


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
        ({"task": "extend", "clip": "clip.apng", "frames": 4, "seed": "a"}, "seed='a' is invalid"),
        ({"task": "extend", "clip": "clip.apng", "frames": "4"}, "frames='4' is invalid: it must be a whole number"),
        ({"task": "extend", "clip": 4, "frames": 4}, "clip=4 is invalid: it must be the name of a file"),
        ({"task": "loop", "size": [8, 16]}, r"size=\[8, 16\] is invalid: it must be a list of frames, height and"),
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


class FakePipeline:
    """A pipeline whose tasks return the clips that they extend."""

    config = SimpleNamespace(batch=1)

    def run_many(self, tasks, options, *, sampling):
        return [Clip(task.clip.frames, 8, caption="a clip") for task in tasks]


def test_a_full_disk_leaves_the_finished_results(tmp_path, monkeypatch):
    entries = [make_entry() for _ in range(6)]
    saved = []

    def save(self, path, **options):
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        saved.append(path)
        path.write_bytes(b"x")

    monkeypatch.setattr(Clip, "save", save)
    with pytest.raises(UserError, match=r"cannot be written after 3 results .*No space left"):
        write_task_results(FakePipeline(), entries, tmp_path / "out", options=Request(""))
    assert sorted(path.name for path in saved) == [f"{number:03d}-a-clip.mp4" for number in range(3)]
    assert len((tmp_path / "out" / task_results.LINES_FILE).read_text().splitlines()) == 3


def test_results_before_ctrl_c_are_kept(tmp_path):
    entries, done = [make_entry() for _ in range(12)], []

    def progress(count):
        done.append(count)
        if count == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_task_results(FakePipeline(), entries, tmp_path / "out", options=Request(""), progress=progress)
    assert len((tmp_path / "out" / task_results.LINES_FILE).read_text().splitlines()) == 5
    assert (tmp_path / "out" / task_results.SHEET_FILE).is_file()


def make_entry():
    return TaskEntry(Extend(clip=Clip(FRAMES, 8), frames=4), 0)


def test_a_contact_sheet_has_a_row_for_each_clip():
    sheet = make_contact_sheet([Clip(FRAMES, 8), Clip(FRAMES[:1, :8], 8)])
    assert sheet.frames.shape == (1, 2 * 18, 6 * 18, 3)
    np.testing.assert_array_equal(sheet.frames[0, 18:26, :16], FRAMES[0, :8])
