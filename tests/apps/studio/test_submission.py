"""Python and commands of the gallery: run as they are copied, they make the same clip."""

import base64
import io
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
from PIL import Image

from dit_video.apps.studio.forms import make_sampling_form, make_tabs
from dit_video.apps.studio.gallery import get_input_file
from dit_video.apps.studio.submission import format_command, format_python, parse_submission
from dit_video.loading import read_config
from dit_video.sampling import tasks
from dit_video.sampling.adapters import AdapterFile
from dit_video.sampling.request import Request
from dit_video.sampling.tasks import Doc, Task
from dit_video.video import Clip, decode, encode
from support.tiny_pipeline import make_config, make_pipeline

ROOT = Path(__file__).resolve().parents[3]
CLIP = Clip(np.random.default_rng(0).integers(0, 255, (9, 16, 32, 3), np.uint8), fps=8)
SIZE = {"frames": 5, "height": 16, "width": 16}
ITEM = {"item": "0" * 16}
TABS = {
    "text_to_video": {"prompt": 'it\'s a "dot"', "size": SIZE},
    "image_to_video": {"prompt": "a dot", "image": ITEM, "size": SIZE},
    "first_and_last_frame": {"prompt": "a dot", "image": ITEM, "last_image": ITEM | {"frame": -1}, "size": SIZE},
    "keyframes": {"prompt": "a dot", "conditions": [ITEM | {"at": 0}, ITEM | {"frame": 3, "at": 4}], "size": SIZE},
    "extend": {"prompt": "on", "clip": ITEM, "frames": 4, "before": True},
    "blend": {"first": ITEM, "second": ITEM, "frames": 7},
    "interpolate": {"clip": ITEM, "factor": 2},
    "loop": {"prompt": "around", "size": SIZE | {"frames": 8}},
    "inpaint": {"clip": ITEM, "generated": "MASK"},
    "outpaint": {"clip": ITEM, "size": {"height": 32, "width": 48}},
    "zoom_out": {"image": ITEM, "frames": 2, "factor": 1.4},
    "edit": {"prompt": "a square", "clip": ITEM, "strength": 0.6},
    "described_edit": {"prompt": "a square", "clip": ITEM, "source": "a dot", "edit_method": "inversion"},
    "vary": {"clip": ITEM, "strength": 0.5},
}


class Media:
    """A gallery of one clip."""

    def open_clip(self, reference):
        return CLIP

    def fit_image(self, image):
        return image


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Return the folder of a tiny model with random weights."""
    folder = tmp_path_factory.mktemp("code") / "my model"
    make_pipeline(make_config(steps=2)).save(folder)
    return folder


def make_submission(tab, values, sampling=None, adapters=None):
    config = make_config(steps=2)
    if values.get("generated") == "MASK":
        values = values | {"generated": {"png": make_mask()}}
    form = make_sampling_form(config, adapters=adapters or {}, checkpoints=[40])
    body = {"tab": tab, "values": values, "sampling": {"seed": 3, **(sampling or {})}}
    return parse_submission(body, config, make_tabs(config), form, Media())


def make_mask():
    picture = np.zeros((16, 32), np.uint8)
    picture[4:12, 8:24] = 255
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_inputs(submission, folder):
    for name, clip in submission.inputs.items():
        clip.save(folder / f"{name}.{get_input_file(clip.frames.shape)}")


def sample(submission, model):
    pipeline = make_pipeline(read_config(model))
    (clip,) = pipeline.run([submission.task], seed=submission.seeds, **submission.options)
    return clip


def test_every_tab_has_an_example_here():
    assert TABS.keys() == {tab.name for tab in make_tabs(make_config(steps=2))}


@pytest.mark.slow
@pytest.mark.parametrize("tab", TABS)
def test_python_and_the_command_make_the_same_clip(tab, model, tmp_path, monkeypatch):
    sampling = {"steps": 3, "guidance": 1.3, "negative": "a 'bad' one"} if tab == "text_to_video" else {}
    submission = make_submission(tab, TABS[tab], sampling)
    expected = sample(submission, model)
    write_inputs(submission, tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(format_python(submission, str(model), 3, {}), "copied.py", "exec"), {})
    np.testing.assert_allclose(decode(Path("result.apng")).frames.astype(int), expected.frames, atol=1)
    command = format_command(submission, str(model), 3, {})
    python, script, *arguments = shlex.split(command)
    assert (python, script) == ("python", "experiments/sample.py")
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--no-cache"])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    Path("expected.mp4").write_bytes(encode(expected, "mp4"))
    difference = decode(Path("result.mp4")).frames.astype(int) - decode(Path("expected.mp4")).frames
    assert np.abs(difference).mean() < 0.5  # of noise of 0..255, whose seed is another in another clip


def test_checkpoints_and_adapters_are_part_of_both():
    adapters = {"style": AdapterFile(Path("loras/style.safetensors"), 0.8, "backbone")}
    sampling = {"checkpoint": "40", "lora:style": 0.5}
    submission = make_submission("text_to_video", TABS["text_to_video"], sampling, {"style": 0.8})
    python = format_python(submission, "runs/a", 3, adapters)
    assert "dit_video.load('runs/a', step=40)" in python
    assert "pipe.load_lora('style.safetensors', 0.5)" in python
    command = shlex.split(format_command(submission, "runs/a", 3, adapters))
    assert command[command.index("--step") + 1] == "40"
    assert command[command.index("--lora") + 1] == "style.safetensors@0.5@backbone"


def test_every_value_has_an_option():
    values = TABS["described_edit"] | {"source_guidance": 2.0}
    submission = make_submission("described_edit", values)
    command = shlex.split(format_command(submission, "runs/a", 3, {}))
    assert command[command.index("--source-guidance") + 1] == "2.0"
    assert "source_guidance=2.0" in format_python(submission, "runs/a", 3, {})


def test_a_task_without_a_prompt_is_submitted(monkeypatch):
    @dataclass(frozen=True)
    class Redraw(Task):
        """A clip that is drawn anew."""

        clip: Annotated[Clip, Doc("Clip.")]

        def make_request(self, config):
            return Request("", self.clip.frames.shape[:3], video=self.clip, strength=1.0)

    monkeypatch.setitem(tasks.TASKS, "redraw", Redraw)
    submission = make_submission("redraw", {"clip": ITEM})
    assert (submission.task, submission.title) == (Redraw(CLIP), "Redraw")


@pytest.mark.slow
def test_a_task_of_another_package_has_python_alone(model, tmp_path, monkeypatch, add_package):
    monkeypatch.setitem(tasks.TASKS, "shimmer", tasks.Vary)  # which ends with the test
    add_package("their_tasks", "shimmer_task")
    submission = make_submission("shimmer", {"image": ITEM, "seconds": 0.5})
    assert format_command(submission, str(model), 3, {}) is None
    write_inputs(submission, tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(format_python(submission, str(model), 3, {}), "copied.py", "exec"), {})
    expected = sample(submission, model).frames
    np.testing.assert_allclose(decode(Path("result.apng")).frames.astype(int), expected, atol=1)
