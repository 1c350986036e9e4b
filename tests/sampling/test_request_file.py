"""Requests in JSON files, with pictures and noise in files beside them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.sampling.completion import Completion
from dit_video.sampling.request import Condition, Request
from dit_video.sampling.request_file import list_files, write_request
from dit_video.sampling.tasks.task_file import read_entries
from dit_video.tokens import Grid
from dit_video.video import Clip, decode

GOOD = {"prompt": "a red circle", "frames": 1, "height": 16, "width": 16}


def test_seed_and_negative_prompt_may_be_absent(tmp_path):
    entries = [GOOD, GOOD | {"seed": 4, "negative": "x", "file": "of a sample"}, GOOD | {"negative": ""}]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    size = Grid(1, 16, 16)
    assert read_entries(tmp_path / "list.json") == [
        Request("a red circle", size),
        Request("a red circle", size, 4, "x"),
        Request("a red circle", size, negative=""),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not valid JSON"),
        ("[]", r"holds no prompts: .*\.csv.* column prompt; .* Use \[\"a red circle\"\]"),
        (json.dumps(GOOD), "holds no prompts: a list of prompts is"),
        (json.dumps([GOOD, 3]), "holds no prompts: a list of prompts is"),
        (json.dumps([GOOD | {"frames": "1"}]), "entry 0: frames must be a whole number, not '1'"),
        (json.dumps([GOOD | {"height": 16.5}]), "entry 0: height must be a whole number, not 16.5"),
        (json.dumps([GOOD | {"seed": True}]), "entry 0: seed must be a whole number"),
        (json.dumps([GOOD | {"negative": 3}]), "entry 0: negative must be a text, not 3"),
        (json.dumps([GOOD | {"prompt": 3}]), "entry 0: prompt must be a text, not 3"),
        (json.dumps([{name: value for name, value in GOOD.items() if name != "width"}]), "entry 0: width"),
        (json.dumps([GOOD, GOOD | {"imge": "a.png"}]), r"entry 1: imge='a.png' is invalid: .* Use image\."),
        (json.dumps([GOOD | {"id": 3}]), "entry 0: id=3 is invalid: .* Use prompt, negative, seed, frames, height"),
        (json.dumps([GOOD | {"guidance": 7}]), "entry 0: guidance=7 is invalid: .* Use --guidance for all"),
        (json.dumps([GOOD | {"guidance_method": "apg"}]), "Use --guidance-method for all"),
        (json.dumps([GOOD | {"conditioning": ["depth"]}]), "conditioning=.* Use Pipeline.generate_many in Python"),
    ],
)
def test_invalid_lists_of_prompts_are_refused(tmp_path, content, message):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_entries(tmp_path / "list.json")
    assert "\n" not in str(error.value)
    for absent in ("absent.json", "absent.txt"):
        with pytest.raises(MissingError, match="no such file"):
            read_entries(tmp_path / absent)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "mark"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.txt", "a red circle\r\n\r\na blue square, moving\r\n"),
        ("list.json", '["a red circle", {"prompt": "a blue square, moving"}]'),
        ("list", '["a red circle", "a blue square, moving"]'),
        ("list.jsonl", '"a red circle"\r\n\n{"prompt": "a blue square, moving"}\n'),
        ("list.csv", 'prompt,negative,seed\r\na red circle,,0\r\n"a blue square, moving",,\r\n'),
    ],
)
def test_prompts_are_texts_or_objects_in_files_of_several_kinds(tmp_path, name, content, mark):
    """Those of Windows begin with a mark."""
    (tmp_path / name).write_bytes(f"{mark}{content}".encode())
    assert read_entries(tmp_path / name) == [Request("a red circle"), Request("a blue square, moving")]


def test_cells_of_a_table_are_texts_and_numbers(tmp_path):
    Clip(np.zeros((5, 8, 8, 3), np.uint8), 8).save(tmp_path / "1.apng")
    rows = "task,prompt,negative,seed,clip,frames,before\nextend,7,3,5,1.apng,4,true\n"
    (tmp_path / "list.csv").write_text(rows)
    ((task, options),) = read_entries(tmp_path / "list.csv")
    assert (task.prompt, task.frames, task.before, len(task.clip)) == ("7", 4, True, 5)
    assert (options.seed, options.negative) == (5, "3")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", "a red circle".encode("utf-16"), "is not UTF-8 .* Save it as UTF-8"),
        ("list.txt", b"", "holds no prompts: .* a prompt on each line"),
        ("list.csv", b"prompt\na cat, asleep\n", "entry 0: it has more cells .* commas into double quotes"),
        ("list.csv", b"prompt;seed\na cat;3\n", "there is no column prompt, but prompt;seed: .* Use .*a red circle"),
        ("list.jsonl", b'"a cat"\na dog\n', "list.jsonl, line 2 is not valid JSON"),
        ("list.yaml", b"- a cat\n", r"list.yaml is invalid: .*\.txt.* Use \[\"a red circle\"\]"),
    ],
)
def test_files_of_other_content_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_entries(tmp_path / name)


@pytest.fixture
def folder(tmp_path):
    """Return a folder with two images and two clips."""
    generator = np.random.default_rng(0)
    for name, shape in {"a.png": (1, 8, 12), "b.png": (1, 6, 6), "clip.gif": (5, 8, 8), "mask.gif": (5, 8, 8)}.items():
        frames = generator.integers(0, 2, (*shape, 1), dtype=np.uint8) * 255
        Clip(frames.repeat(3, -1), 10).save(tmp_path / name)
    return tmp_path


def test_an_entry_names_files_beside_the_list(folder):
    entry = {"prompt": "a cat", "image": "a.png", "last_image": "b.png", "reference_images": ["b.png", "clip.gif"]}
    entry |= {
        "control": "clip.gif",
        "conditions": [{"file": "a.png"}, {"file": "clip.gif", "frame": 8, "strength": 0.5}],
    }
    (folder / "list.json").write_text(json.dumps([entry | {"strengths": {"control": 0.5}}]))
    (request,) = read_entries(folder / "list.json")
    assert request.size is None
    assert request.image.frames.shape == (1, 8, 12, 3)
    assert request.last_image.frames.shape == (1, 6, 6, 3)
    assert [image.frames.shape for image in request.reference_images] == [(1, 6, 6, 3), (1, 8, 8, 3)]
    assert request.control.frames.shape == (5, 8, 8, 3)
    conditions = [(len(each.content.frames), each.frame, each.strength) for each in request.conditions]
    assert conditions == [(1, 0, 1.0), (5, 8, 0.5)]
    assert request.strengths == {"control": 0.5}


@pytest.mark.parametrize(("mask", "is_video"), [("mask.gif", True), ("b.png", False)])
def test_white_parts_of_a_video_are_generated_and_an_image_masks_all_frames(folder, mask, is_video):
    (folder / "list.json").write_text(json.dumps([{"prompt": "", "video": "clip.gif", "generated": mask}]))
    (request,) = read_entries(folder / "list.json")
    assert request.generated.shape == ((5, 8, 8) if is_video else (6, 6))
    white = decode(folder / mask).frames[..., 0] > 127
    np.testing.assert_array_equal(request.generated, white if is_video else white[0])


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"image": "absent.png"}, MissingError, "absent"),
        ({"image": "list.json"}, DecodeError, "list"),
        ({"image": 3}, UserError, "image=3 is invalid: it must be the name of a file"),
        ({"generated": "b.png"}, UserError, "generated=b.png is invalid without a video"),
        ({"video": "clip.gif", "mask": "b.png"}, UserError, "mask='b.png' is invalid: .* Use generated, white where"),
        ({"conditions": [{"file": "b.png", "mask": "b.png"}]}, UserError, "mask='b.png' is invalid: .* Use generated"),
        ({"reference_images": "b.png"}, UserError, "reference_images='b.png' is invalid: it must be a list"),
        ({"conditions": ["b.png"]}, UserError, r"conditions=.* it must be \{\"file\": NAME"),
        ({"conditions": [{"file": "b.png", "strength": 2}]}, UserError, "strength=2.0 is invalid"),
        (
            {"conditions": [{"file": "b.png", "frames": 2}]},
            UserError,
            r"frames=2 of a condition .* Use frame\.",
        ),
        ({"noise": 3}, UserError, "noise=3 is invalid: it must be the name of a file"),
        ({"noise": "absent.npy"}, MissingError, "no such file: .*absent.npy of noise"),
        ({"noise": "b.png"}, UserError, "noise='b.png' is invalid: .* Use numpy.save"),
        ({"noise": "flat.npy"}, UserError, r"noise='flat.npy' is invalid: it holds float64 \[3\]"),
        ({"strengths": 1}, UserError, "entry 0: strengths must be an object"),
        ({"strengths": {"control": [1, "2"]}}, UserError, r"entry 0: strengths must be numbers .* not \[1, '2'\]"),
    ],
)
def test_pictures_that_cannot_be_read_are_refused(folder, entry, error, message):
    np.save(folder / "flat.npy", np.zeros(3))
    (folder / "list.json").write_text(json.dumps([{"prompt": "", **entry}]))
    with pytest.raises(error, match=message):
        read_entries(folder / "list.json")


def test_noise_is_read_from_a_file_beside_the_list(tmp_path):
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 4))
    np.save(tmp_path / "noise.npy", noise)
    (tmp_path / "list.json").write_text(json.dumps([GOOD | {"noise": "noise.npy"}]))
    (request,) = read_entries(tmp_path / "list.json")
    assert request.noise.dtype == np.float32
    np.testing.assert_array_equal(request.noise, noise.astype(np.float32))


@pytest.mark.parametrize("frames", [1, 4])
def test_a_request_is_read_as_it_was_written(tmp_path, frames):
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    clip = Clip(draw.integers(0, 256, (frames, 7, 9, 3), dtype=np.uint8), 16)
    still = Clip(np.repeat(image[None], frames, axis=0), 16)  # whose frames are all equal
    conditions = (Condition(content=image), Condition(content=clip, frame=-1, strength=0.5))
    strengths = {"depth": 0.5, "control": (1.0, 0.5)}
    request = Request(
        "a cat", (5, 16, 16), 7, "a dog", image, Clip(still.frames[:1], 16), strengths=strengths, conditions=conditions
    )
    generated = draw.random((frames, 7, 9)) < 0.5
    request = replace(request, video=clip, generated=generated, control=still)
    entry = write_request(replace(request, noise=draw.standard_normal((1, 2, 2, 4), np.float32)), tmp_path)
    assert write_request(request, tmp_path) == {name: value for name, value in entry.items() if name != "noise"}
    assert list_files(entry) == {f"inputs/{path.name}" for path in (tmp_path / "inputs").iterdir()}
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    (read,) = read_entries(tmp_path / "list.json")
    assert (read.prompt, read.size, read.seed, read.negative, read.strengths) == (
        "a cat",
        (5, 16, 16),
        7,
        "a dog",
        {"depth": 0.5, "control": (1.0, 0.5)},
    )
    for picture, expected in ((read.image, still.frames[:1]), (read.control, still.frames), (read.video, clip.frames)):
        np.testing.assert_array_equal(picture.frames, expected)
    np.testing.assert_array_equal(np.broadcast_to(read.generated, generated.shape), generated)
    assert [(each.frame, each.strength) for each in read.conditions] == [(0, 1.0), (-1, 0.5)]
    np.testing.assert_array_equal(read.conditions[1].content.frames, clip.frames)
    assert read.noise.shape == (1, 2, 2, 4)


def test_a_written_request_says_what_no_file_holds(tmp_path):
    request = Request("a cat", conditioning={"depth": np.zeros(3)}, conditioner=Completion())
    entry = write_request(request, tmp_path)
    assert entry == {"prompt": "a cat", "seed": 0, "conditioning": ["depth"], "conditioner": "Completion"}
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match=r"conditioning=\['depth'\] .* Use Pipeline\.generate_many in Python"):
        read_entries(tmp_path / "list.json")
