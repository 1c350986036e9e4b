"""`tools/render_scenes.py` and `experiments/evaluate_tasks.py`, from scenes to the figures of every task."""

import csv
import json

import pytest

from dit_video.scenes import draw_scene
from dit_video.scenes.tasks import TASK_MEASURES


def test_scenes_are_rendered_into_a_folder_of_clips(script, tmp_path):
    done = script("tools/render_scenes.py", "--out", tmp_path / "clips", "--count", 6, "--levels", 1, 3, "--seed", 4)
    assert done.code == 0, done.err
    with (tmp_path / "clips" / "metadata.csv").open() as file:
        captions = [row["text"] for row in csv.DictReader(file)]
    assert captions == [draw_scene(index, seed=4, level=(1, 3)[index % 2]).caption for index in range(6)]
    assert len(list((tmp_path / "clips" / "clips").iterdir())) == 6


@pytest.mark.slow
def test_every_task_is_sampled_and_measured(script, tiny_run, tmp_path):
    done = script("experiments/evaluate_tasks.py", tiny_run, "--out", tmp_path / "out", "--count", 1)
    assert done.code == 0, done.err
    for name, task in TASK_MEASURES.items():
        figures = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        methods = [key for key in figures if key not in ("count", "levels", "seed", "resample", "seconds")]
        expected = {"auto", "training_free"} if task.is_completed else {"auto"}
        assert set(methods) == (expected if name != "editing" else {"sdedit", "flow_edit", "inversion"})
        for method in methods:
            names = [value for metric in task.metrics for value in metric.describe()]
            assert list(figures[method]) == names
            assert len(list((tmp_path / "out" / name / method).iterdir())) == 1
        assert f"{name}, {methods[0]}:" in done.out


def test_tasks_that_do_not_exist_are_named(script, tiny_run, tmp_path):
    done = script("experiments/evaluate_tasks.py", tiny_run, "--out", tmp_path / "out", "--tasks", "flying")
    assert done.code == 2
    assert "tasks=flying is unknown; use text_to_video" in " ".join(done.err.split())
