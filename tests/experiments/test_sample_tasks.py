"""`experiments/sample.py --task`, and lists of tasks."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.evaluation import task_results
from dit_video.evaluation.task_results import make_contact_sheet, write_task_results
from dit_video.sampling.tasks import TASKS, Extend, Inpaint, Interpolate
from dit_video.sampling.tasks.task_file import TaskEntry, make_task, read_tasks
from dit_video.video import Clip, decode, read_recipe
from support.tiny_wan import write_wan

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))

from task_options import TaskName

SAMPLE = "experiments/sample.py"
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def clip(tmp_path):
    Clip(FRAMES, 8).save(tmp_path / "clip.apng")
    return tmp_path / "clip.apng"


@pytest.mark.slow
def test_a_task_writes_a_folder_with_a_contact_sheet_and_lines(script, tmp_path, clip):
    write_wan(tmp_path / "wan")
    entries = [{"prompt": "a dog", "clip": clip.name, "frames": 4, "seed": seed} for seed in range(2)]
    (tmp_path / "tasks.json").write_text(json.dumps(entries))
    options = ("--task", "extend", "--prompts", tmp_path / "tasks.json", "--steps", 2, "--out", tmp_path / "out")
    done = script(SAMPLE, tmp_path / "wan", *options)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["000-a-dog.mp4", "001-a-dog.mp4"]
    for seed, line in enumerate(lines):
        path = tmp_path / "out" / line["file"]
        assert len(decode(path).frames) == line["frames"] == 9
        assert line["recipe"]["seed"] == seed
        assert line["recipe"]["clip_task"]["name"] == "Extend"
        assert read_recipe(path) == line["recipe"]
    sheet = decode(tmp_path / "out" / "contact_sheet.png")
    assert sheet.frames.shape == (1, 36, 108, 3)
    again = script(SAMPLE, tmp_path / "wan", *options)
    assert again.code == 2
    assert "is not an empty folder" in again.err


def test_a_task_of_options_needs_its_values(script, tmp_path, clip):
    write_wan(tmp_path / "wan")
    done = script(SAMPLE, tmp_path / "wan", "--task", "interpolate", "--out", tmp_path / "out")
    assert done.code == 2
    assert "clip is missing: interpolate needs clip" in done.err
    done = script(SAMPLE, tmp_path / "wan", "--prompt", "x", "--clip", clip, "--out", tmp_path / "x.gif")
    assert done.code == 2
    assert "need --task" in " ".join(done.err.split())


def test_lists_of_tasks_are_read_with_their_files(tmp_path, clip):
    mask = np.zeros((1, 16, 16, 3), np.uint8)
    mask[:, 4:8] = 255
    Clip(mask, 1).save(tmp_path / "mask.png")
    (tmp_path / "a.json").write_text(json.dumps([{"clip": clip.name, "mask": "mask.png", "prompt": "b", "seed": 4}]))
    ((task, seed, _),) = read_tasks(tmp_path / "a.json", "inpaint")
    assert isinstance(task, Inpaint)
    assert (task.prompt, seed, task.mask.shape, task.mask.sum()) == ("b", 4, (5, 16, 16), 5 * 4 * 16)
    np.testing.assert_array_equal(task.clip.frames, FRAMES)
    (tmp_path / "a.json").write_text(json.dumps([{"clip": clip.name, "times": [0, 1, 3, 6, 7]}]))
    ((task, _, _),) = read_tasks(tmp_path / "a.json", "interpolate")
    assert isinstance(task, Interpolate)
    assert task.places == [0, 1, 3, 6, 7]
    (tmp_path / "a.txt").write_text("a dog\n\n  a cat \n")
    assert [entry.task.prompt for entry in read_tasks(tmp_path / "a.txt", "generate")] == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("fly", {}, "task='fly' is unknown; use generate, extend"),
        ("extend", {"frames": 4}, "clip is missing"),
        ("extend", {"clip": "clip.apng", "frame": 4}, "frame=4 is invalid: extend has no such value. Use frames"),
        ("extend", {"clip": "clip.apng", "frames": 4, "seed": "a"}, "seed='a' is invalid"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path, clip, name, values, message):
    with pytest.raises(UserError, match=message):
        make_task(name, values, tmp_path)
    with pytest.raises(MissingError, match="no such"):
        make_task("extend", {"clip": "other.mp4", "frames": 4}, tmp_path)


def test_every_task_has_an_option():
    assert set(get_args(TaskName)) == set(TASKS)


class FakePipeline:
    """A pipeline whose tasks return the clips that they extend."""

    config = SimpleNamespace(batch=1)
    codec = None
    preview_decoder = None

    def make_stepper(self, *args, **overrides):
        raise AssertionError

    def run_tasks(self, tasks, *, seeds, **options):
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
        write_task_results(FakePipeline(), entries, tmp_path / "out")
    assert sorted(path.name for path in saved) == [f"{number:03d}-a-clip.mp4" for number in range(3)]
    assert len((tmp_path / "out" / task_results.LINES_FILE).read_text().splitlines()) == 3


def test_results_before_ctrl_c_are_kept(tmp_path):
    entries, done = [make_entry() for _ in range(12)], []

    def progress(count):
        done.append(count)
        if count == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_task_results(FakePipeline(), entries, tmp_path / "out", progress=progress)
    assert len((tmp_path / "out" / task_results.LINES_FILE).read_text().splitlines()) == 5
    assert (tmp_path / "out" / task_results.SHEET_FILE).is_file()


def make_entry():
    return TaskEntry(Extend(clip=Clip(FRAMES, 8), frames=4), 0, {})


def test_a_contact_sheet_has_a_row_for_each_clip():
    sheet = make_contact_sheet([Clip(FRAMES, 8), Clip(FRAMES[:1, :8], 8)])
    assert sheet.frames.shape == (1, 2 * 18, 6 * 18, 3)
    np.testing.assert_array_equal(sheet.frames[0, 18:26, :16], FRAMES[0, :8])
