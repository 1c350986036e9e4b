"""Forms: a tab for every task, fields by types, and the values of a browser's answers."""

import base64
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
from PIL import Image

from dit_video.apps.studio.forms import (
    FormError,
    make_form,
    make_sampling_form,
    make_tabs,
    parse_answers,
)
from dit_video.core.errors import UserError
from dit_video.families.vace.pipeline import VaceConditioner
from dit_video.sampling import tasks
from dit_video.sampling.request import Conditioner
from dit_video.sampling.tasks import Doc, Extend, Inpaint, Limits, Prompt, Task
from dit_video.sampling.tasks.task_file import read_task
from dit_video.video import Clip
from support.tiny_pipeline import make_config

CONFIG = make_config(steps=4)
CLIP = Clip(np.arange(9 * 16 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(9, 16, 32, 3), fps=8, caption="a dot")


class Media:
    """A gallery of one clip."""

    def open_clip(self, reference):
        if reference != {"item": "0" * 16} | {
            key: reference[key] for key in reference if key in ("frame", "at", "strength")
        }:
            raise UserError("it does not exist")
        return CLIP

    def fit_image(self, image):
        return image


def get_tab(name):
    return next(tab for tab in make_tabs(CONFIG) if tab.name == name)


def parse(name, **answers):
    return get_tab(name).parse(answers, Media())


def encode_mask(mask):
    buffer = io.BytesIO()
    Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))).save(buffer, "PNG")
    return {"png": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}


ITEM = {"item": "0" * 16}
SIZE_OF_FORM = {"frames": 5, "height": 16, "width": 16}


def test_every_task_has_a_tab_and_all_descriptions_are_json():
    tabs = make_tabs(CONFIG)
    names = [tab.name for tab in tabs]
    assert names[:4] == ["text_to_video", "image_to_video", "first_and_last_frame", "keyframes"]
    assert set(names[4:]) == tasks.TASKS.keys() - {"generate"}
    described = json.loads(json.dumps([tab.describe() for tab in tabs]))
    for tab in described:
        assert tab["title"]
        assert tab["help"].endswith(".")
        assert all(field["title"] for field in tab["fields"])


def test_a_new_task_has_a_tab_without_a_line_in_the_studio(monkeypatch):
    @dataclass(frozen=True)
    class Whirl(Task):
        """A clip that turns."""

        clip: Annotated[Clip, Doc("Clip that turns.")]
        prompt: Prompt = None
        turns: Annotated[int, Doc("Number of turns.", title="Turns of it"), Limits(minimum=2)] = 3
        is_smooth: bool = False

    monkeypatch.setitem(tasks.TASKS, "whirl", Whirl)
    tab = next(tab for tab in make_tabs(CONFIG) if tab.name == "whirl")
    assert (tab.title, tab.help) == ("Whirl", "A clip that turns.")
    assert [(field.kind, field.name, field.title, field.default) for field in tab.fields] == [
        ("clip", "clip", "Clip", None),
        ("text", "prompt", "Prompt", None),
        ("number", "turns", "Turns of it", 3),
        ("flag", "is_smooth", "Is smooth", False),
    ]
    (turns,) = (field for field in tab.fields if field.name == "turns")
    assert (turns.help, turns.minimum, turns.is_whole) == ("Number of turns.", 2, True)
    values = tab.parse({"clip": ITEM, "turns": 5}, Media())
    assert tab.make_task(values) == Whirl(CLIP, turns=5)


def test_a_task_has_exclusive_limits_and_no_tab_without_its_required_fields(monkeypatch):
    @dataclass(frozen=True)
    class Dim(Task):
        """A clip that is dimmed."""

        clip: Annotated[Clip, Doc("Clip.")]
        share: Annotated[float, Doc("Share of the light."), Limits(above=0, maximum=1)] = 0.5

    @dataclass(frozen=True)
    class Score(Task):
        """A clip with music."""

        clip: Annotated[Clip, Doc("Clip.")]
        music: Annotated[bytes, Doc("Music.")]

    monkeypatch.setitem(tasks.TASKS, "dim", Dim)
    monkeypatch.setitem(tasks.TASKS, "score", Score)
    tabs = {tab.name: tab for tab in make_tabs(CONFIG)}
    assert "score" not in tabs
    share = tabs["dim"].fields[1].describe()
    assert (share["min"], share["above"], share["max"]) == (None, 0, 1)
    for value in (0.01, 0.5, 1):
        assert tabs["dim"].make_task(tabs["dim"].parse({"clip": ITEM, "share": value}, Media())).share == value
    for value in (0, 1.5):
        with pytest.raises(FormError, match=f"{value} is out of range. Use more than 0 and at most 1"):
            tabs["dim"].parse({"clip": ITEM, "share": value}, Media())
    with pytest.raises(
        UserError, match=r"task='score' is invalid: no file holds its required music. Use Pipeline\.run"
    ):
        read_task({"task": "score", "clip": "a.mp4"}, Path())


def test_tabs_whose_tasks_keep_pixels_say_how_a_model_without_training_does():
    noted = {tab.name for tab in make_tabs(CONFIG) if "training-free" in tab.note}
    others = {"text_to_video", "loop", "edit", "described_edit", "vary"}
    assert noted == {tab.name for tab in make_tabs(CONFIG)} - others


def test_a_model_that_takes_control_and_references_has_a_tab_of_them():
    tabs = {tab.name: tab for tab in make_tabs(replace(CONFIG, conditioner=VaceConditioner()))}
    assert [field.kind for field in tabs["control"].fields] == ["text", "clip", "images", "size"]
    references = [ITEM, ITEM | {"frame": 1}]
    answers = {"prompt": "a", "control": ITEM, "reference_images": references, "size": SIZE_OF_FORM}
    values = tabs["control"].parse(answers, Media())
    task = tabs["control"].make_task(values)
    assert (task.prompt, tuple(task.size), task.video) == ("a", (5, 16, 16), None)
    first, second = values["reference_images"]
    np.testing.assert_array_equal(second.frames[0], CLIP.frames[1])
    assert first.frames.shape[0] == 1
    with pytest.raises(FormError, match=r"References is invalid: it has 9 images\. Use at most 8"):
        tabs["control"].parse(answers | {"reference_images": [ITEM] * 9}, Media())


def test_a_conditioner_that_does_not_say_what_it_accepts_has_the_tabs_of_pictures():
    class Own(Conditioner):
        def __call__(self, request, model): ...

    names = {tab.name for tab in make_tabs(replace(CONFIG, conditioner=Own()))}
    assert {"image_to_video", "keyframes"} <= names
    assert "control" not in names


def test_keyframes_are_images_at_frames():
    at = [ITEM | {"at": 0}, ITEM | {"frame": 2, "at": 4, "strength": 0.5}]
    task = get_tab("keyframes").make_task(parse("keyframes", prompt="a", conditions=at, size=SIZE_OF_FORM))
    assert [(each.frame, each.strength) for each in task.conditions] == [(0, 1), (4, 0.5)]
    np.testing.assert_array_equal(task.conditions[1].content.frames[0], CLIP.frames[2])
    for wrong, message in (
        (None, "Keyframes is missing"),
        ([ITEM | {"at": -1}], "frame -1 does not exist"),
        ([ITEM | {"at": 1, "strength": 0}], "above 0 and at most 1"),
        ("x", "must be a list of images"),
    ):
        with pytest.raises(FormError, match=message):
            parse("keyframes", prompt="a", conditions=wrong, size=SIZE_OF_FORM)


def test_values_of_a_form_make_the_task():
    values = parse("extend", clip=ITEM, prompt=" a red dot ", frames=8, before=True, overlap=None)
    task = get_tab("extend").make_task(values)
    assert task == Extend(clip=CLIP, prompt="a red dot", frames=8, before=True)
    mask = np.zeros((16, 32), bool)
    mask[4:9, 3:20] = True
    inpaint = get_tab("inpaint").make_task(parse("inpaint", clip=ITEM, generated=encode_mask(mask)))
    assert isinstance(inpaint, Inpaint)
    np.testing.assert_array_equal(inpaint.generated, mask)


def test_an_image_is_a_frame_of_a_clip():
    first = parse("image_to_video", image=ITEM, size={"frames": 9, "height": 16, "width": 32})["image"]
    last = parse("image_to_video", image=ITEM | {"frame": -1}, size={"frames": 9, "height": 16, "width": 32})["image"]
    np.testing.assert_array_equal(first.frames, CLIP.frames[:1])
    np.testing.assert_array_equal(last.frames, CLIP.frames[-1:])


@pytest.mark.parametrize(
    ("tab", "answers", "field"),
    [
        ("extend", {"frames": 8}, "clip"),
        ("extend", {"clip": ITEM, "frames": 2.5}, "frames"),
        ("extend", {"clip": ITEM, "frames": 0}, "frames"),
        ("extend", {"clip": ITEM, "frames": "8"}, "frames"),
        ("extend", {"clip": ITEM, "frames": True}, "frames"),
        ("extend", {"clip": ITEM, "frames": float("nan")}, "frames"),
        ("extend", {"clip": ITEM, "frames": 8, "before": "yes"}, "before"),
        ("extend", {"clip": {"item": "../../x"}, "frames": 8}, "clip"),
        ("extend", {"clip": "x", "frames": 8}, "clip"),
        ("extend", {"clip": ITEM, "frames": 8, "prompt": 5}, "prompt"),
        ("extend", {"clip": ITEM, "frames": 8, "prompt": "x" * 20_000}, "prompt"),
        ("extend", {"clip": ITEM, "frames": 8, "__class__": 1}, None),
        ("edit", {"clip": ITEM, "strength": 1.5}, "strength"),
        ("described_edit", {"clip": ITEM, "source": "x", "edit_method": "magic"}, "edit_method"),
        ("image_to_video", {"image": ITEM | {"frame": 9}, "size": {"frames": 9, "height": 16, "width": 16}}, "image"),
        ("text_to_video", {"size": {"frames": 9, "height": 16}}, "size"),
        ("text_to_video", {"size": {"frames": 9, "height": -16, "width": 16}}, "size"),
        ("inpaint", {"clip": ITEM, "generated": {"png": "data:image/png;base64,AAAA"}}, "generated"),
        ("inpaint", {"clip": ITEM, "generated": {"png": "file:///etc/passwd"}}, "generated"),
        ("inpaint", {"clip": ITEM, "generated": []}, "generated"),
    ],
)
def test_answers_that_are_invalid_are_refused_with_their_field(tab, answers, field):
    with pytest.raises(FormError) as error:
        parse(tab, **answers)
    assert error.value.field == field


def test_sampling_has_the_model_s_own_values_scales_of_adapters_and_checkpoints():
    form = make_sampling_form(CONFIG, adapters={"style": 0.8}, checkpoints=[10, 20])
    defaults = {field.name: field.default for field in form}
    assert (defaults["steps"], defaults["guidance"], defaults["lora:style"]) == (4, 1.5, 0.8)
    values = parse_answers(form, {"seed": 3, "solver": "", "checkpoint": "10", "lora:style": 0}, Media())
    assert values == {"seed": 3, "checkpoint": "10", "lora:style": 0.0}
    for answers in ({"solver": "magic"}, {"seed": -1}, {"seed": 2**32}, {"count": 5}, {"checkpoint": "11"}):
        with pytest.raises(FormError):
            parse_answers(form, answers, Media())


def test_inputs_begin_with_what_a_task_suggests_for_the_model():
    def get_defaults(name):
        return {field.name: field.default for field in make_form(name, CONFIG)}

    assert get_defaults("extend")["frames"] == 8
    assert get_defaults("interpolate")["factor"] == 2
    assert get_defaults("outpaint")["size"][1:] == (48, 64)
    (size,) = (field for field in make_form("loop", CONFIG) if field.name == "size")
    assert (size.default, size.frames_offset) == ((8, 16, 32), 0)
    helps = {field.name: field.help for field in make_form("vary", CONFIG)}
    assert helps["strength"].startswith("Diffusion time that the clip is noised to")
