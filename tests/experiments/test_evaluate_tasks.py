"""`tools/render_scenes.py`, and evaluate.py by the protocols of generation tasks."""

import csv
import json

import pytest

from dit_video.core.errors import UserError
from dit_video.evaluation.protocols import PROTOCOLS
from dit_video.scenes import draw_scene
from dit_video.scenes.tasks import SceneTaskProtocol

TASKS = [name for name in PROTOCOLS if name.startswith("task_")]


def test_scenes_are_rendered_into_a_folder_of_clips(script, tmp_path):
    done = script("tools/render_scenes.py", "--out", tmp_path / "clips", "--count", 6, "--levels", 1, 3, "--seed", 4)
    assert done.code == 0, done.err
    with (tmp_path / "clips" / "metadata.csv").open() as file:
        captions = [row["text"] for row in csv.DictReader(file)]
    assert captions == [draw_scene(index, seed=4, level=(1, 3)[index % 2]).caption for index in range(6)]
    assert len(list((tmp_path / "clips" / "clips").iterdir())) == 6


@pytest.mark.slow
def test_every_task_is_sampled_and_measured(script, tiny_run, tmp_path):
    arguments = ("--protocol", "task_*", "--out", tmp_path / "out", "--count", 1, "--fields", "resample=2")
    done = script("experiments/evaluate.py", tiny_run, *arguments)
    assert done.code == 0, done.err
    assert len(TASKS) == 27
    for name in TASKS:
        record = json.loads((tmp_path / "out" / name / "metrics.json").read_text())
        assert [each["name"] for each in record["results"]] == [
            value for metric in PROTOCOLS[name].metrics for value in metric.describe()
        ]
        assert record["protocol"]["config"]["resample"] == 2
        (listed,) = json.loads((tmp_path / "out" / name / "samples" / "prompts.json").read_text())
        assert (tmp_path / "out" / name / "samples" / listed["file"]).suffix in (".apng", ".png")
        assert (tmp_path / "out" / name / "report.html").is_file()
    assert listed["task"] == "described_edit"


def test_a_task_of_scenes_has_items_of_its_levels(tiny_pipeline):
    protocol = PROTOCOLS["task_extension_forwards_training_free"]
    items = protocol.make_items(tiny_pipeline, protocol.make_data(None))[:4]
    assert [item.truth.scene for item in items] == [
        draw_scene(number, seed=1000, level=(1, 2)[number % 2], sizes=protocol.sizes) for number in range(4)
    ]
    assert [(item.entry.options.seed, item.entry.options.method) for item in items] == [
        (1000 + number, "training_free") for number in range(4)
    ]


def test_tasks_that_do_not_exist_are_named(script, tiny_run, tmp_path):
    with pytest.raises(UserError, match="task='flying' is unknown; use text_to_video"):
        SceneTaskProtocol(name="mine", task="flying", metrics=())
    done = script("experiments/evaluate.py", tiny_run, "--out", tmp_path / "out", "--protocol", "task_flying")
    assert done.code == 2
    assert "there is no such protocol. Use one of ucf101" in " ".join(done.err.split())
