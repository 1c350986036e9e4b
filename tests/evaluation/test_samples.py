"""Samples in a folder, and the list of their requests."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import dit_video
from dit_video.core.errors import UserError
from dit_video.core.offload import Stages
from dit_video.distributed.faults.progress import PROGRESS
from dit_video.evaluation.clip_set import open_clip_set
from dit_video.evaluation.samples import SampleFolder, make_contact_sheet, write_contact_sheet
from dit_video.sampling import sampler
from dit_video.sampling.pipeline import Pipeline, Request
from dit_video.sampling.tasks import Extend, ZoomOut
from dit_video.sampling.tasks.task_file import TaskEntry, read_entries
from dit_video.tokens import Grid
from dit_video.video import Clip, decode
from dit_video.video.comments import read_recipe
from support.extensions.motion_vectors import MotionVectors
from support.tiny_pipeline import make_config, make_params
from support.tiny_wan import SIZE, TWO, write_animating_wan, write_wan

REQUESTS = [
    Request("a red circle moving left", Grid(9, 16, 32), seed=1),
    Request("a blue square", Grid(1, 16, 16), seed=2),
    Request("a white triangle moving up", Grid(5, 16, 16), seed=3, negative="a red circle"),
]


def write_samples(pipeline, requests, folder, *, progress=None, **options):
    """Return the entries of `prompts.json`."""
    SampleFolder(folder, pipeline, requests, replace_others=True, **options).fill(progress)
    return json.loads((folder / "prompts.json").read_text())


def test_options_of_a_list_are_those_of_entries_without_their_own(tmp_path):
    (tmp_path / "prompts.txt").write_text("a circle\n\na square\n")
    options = {"size": Grid(5, 16, 32), "seed": 7, "negative": "blur"}
    first, second = read_entries(tmp_path / "prompts.txt", **options)
    assert first == Request("a circle", Grid(5, 16, 32), 7, "blur")
    assert second == Request("a square", Grid(5, 16, 32), 8, "blur")
    own = {"frames": 1, "height": 16, "width": 16, "seed": 3, "negative": None}
    entries = [{"prompt": "a", **own}, {"prompt": "b"}, {"task": "generate", "prompt": "c"}]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    first, second, third = read_entries(tmp_path / "list.json", **options)
    assert first == Request("a", Grid(1, 16, 16), 3)
    assert second == Request("b", Grid(5, 16, 32), 8, "blur")
    assert (third.options.seed, third.options.negative, third.task.size) == (9, "blur", None)
    assert read_entries(tmp_path / "prompts.txt")[1] == Request("a square")


def test_samples_are_files_of_the_stated_sizes(tiny_pipeline, tmp_path):
    done = []
    entries = write_samples(tiny_pipeline, REQUESTS, tmp_path / "samples", progress=done.append)
    assert done == [1, 2, 3]
    size = {"frames": 9, "height": 16, "width": 32}
    assert entries[0] == {
        "file": "000-a-red-circle-moving-left.mp4",
        "prompt": "a red circle moving left",
        **size,
        "seed": 1,
    }
    assert entries[1]["file"].endswith(".png")
    assert [entry.get("negative") for entry in entries] == [None, None, "a red circle"]
    for entry, request in zip(entries, REQUESTS, strict=True):
        assert decode(tmp_path / "samples" / entry["file"]).frames.shape == (*request.size, 3)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        "prompts.json",
        "settings.json",
        *(entry["file"] for entry in entries),
    }
    assert read_entries(tmp_path / "samples" / "prompts.json") == REQUESTS
    assert list(open_clip_set(tmp_path / "samples").captions) == [request.prompt for request in REQUESTS]


def test_samples_count_as_progress(tiny_pipeline, tmp_path):
    """In a run of several processes the others wait for those that the first one writes."""
    seen = [PROGRESS.changes]
    sampling = tiny_pipeline.make_sampling(steps=1)
    watch = {"progress": lambda _: seen.append(PROGRESS.changes)}
    write_samples(tiny_pipeline, REQUESTS[1:], tmp_path / "a", sampling=sampling, **watch)
    assert seen == sorted(set(seen))


@pytest.mark.nightly
def test_samples_are_the_pipeline_s_clips(tiny_pipeline, tmp_path):
    sampling = tiny_pipeline.make_sampling(steps=3, guidance=1.0, solver="heun")
    write_samples(tiny_pipeline, REQUESTS[1:2], tmp_path / "samples", sampling=sampling)
    expected = tiny_pipeline.generate("a blue square", size=(1, 16, 16), seed=2, steps=3, guidance=1.0, solver="heun")
    written = decode(tmp_path / "samples" / "000-a-blue-square.png")
    np.testing.assert_array_equal(written.frames, expected.frames)


def test_new_samples_replace_old_ones_and_leave_other_files_alone(tiny_pipeline, tmp_path):
    folder = tmp_path / "samples"
    write_samples(tiny_pipeline, REQUESTS[1:], folder)
    write_samples(tiny_pipeline, REQUESTS[1:2], folder)
    assert {path.name for path in folder.iterdir()} == {"prompts.json", "settings.json", "000-a-blue-square.png"}
    (folder / "holiday.mp4").write_bytes(b"dear to its owner")
    with pytest.raises(UserError, match=r"holds other files than samples, such as holiday\.mp4"):
        write_samples(tiny_pipeline, REQUESTS[1:2], folder)
    with pytest.raises(UserError, match="is a file"):
        write_samples(tiny_pipeline, REQUESTS[1:2], folder / "holiday.mp4")
    assert (folder / "holiday.mp4").read_bytes() == b"dear to its owner"


def test_a_list_of_prompts_is_not_overwritten_by_its_samples(tiny_pipeline, tmp_path):
    listed = [{"prompt": "a blue square", "frames": 1, "height": 16, "width": 16}]
    (tmp_path / "prompts.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match="holds other files"):
        write_samples(tiny_pipeline, read_entries(tmp_path / "prompts.json"), tmp_path)
    assert json.loads((tmp_path / "prompts.json").read_text()) == listed


def test_a_request_that_cannot_be_made_leaves_nothing_behind(tiny_pipeline, tmp_path):
    with pytest.raises(UserError, match="width 20"):
        write_samples(tiny_pipeline, [*REQUESTS, Request("x", Grid(1, 16, 20))], tmp_path / "samples")
    assert list(tmp_path.iterdir()) == []


def test_every_prompt_has_a_file_name(tiny_pipeline, tmp_path):
    requests = [Request(prompt, Grid(1, 16, 16)) for prompt in ("", "../../" + 3 * "Ä b")]
    entries = write_samples(tiny_pipeline, requests, tmp_path / "samples")
    assert [entry["file"] for entry in entries] == ["000-unconditional.png", "001-b-b-b.png"]


@pytest.mark.slow
def test_a_written_list_gives_the_same_requests_with_their_pictures_and_noise(tmp_path):
    write_animating_wan(tmp_path / "wan")
    pipeline, draw = dit_video.load(tmp_path / "wan", dtype="float32"), np.random.default_rng(0)
    image = draw.integers(0, 256, (12, 20, 3), dtype=np.uint8)
    noise = draw.standard_normal((2, 4, 4, 4), np.float32)
    requests = [
        Request("a dog", SIZE, image=image),
        Request("a cat", SIZE, 3, image=Clip(image[None], 1), noise=noise),
    ]
    options = {"sampling": pipeline.make_sampling(steps=1, guidance=1.0)}
    entries = write_samples(pipeline, requests, tmp_path / "first", **options)
    inputs = sorted(path.name.split("-")[0] for path in (tmp_path / "first" / "inputs").iterdir())
    assert inputs == ["image", "noise"]  # requests share the file of an image
    again = read_entries(tmp_path / "first" / "prompts.json")
    (tmp_path / "second").mkdir()
    assert write_samples(pipeline, again, tmp_path / "second", **options) == entries
    for path in (tmp_path / "first").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes(), path
    write_samples(pipeline, again[:1], tmp_path / "second", **options)  # replaces samples with inputs
    (tmp_path / "second" / "inputs" / "mine.png").touch()
    with pytest.raises(UserError, match=r"other files than samples, such as inputs/mine\.png"):
        write_samples(pipeline, again, tmp_path / "second", **options)


@pytest.mark.slow
@pytest.mark.parametrize("offload", [None, Stages()])
def test_weights_in_host_memory_move_once_for_all_requests(tmp_path, monkeypatch, offload):
    """Weights that stay on the device are used for a few requests at a time, whose clips are written before others."""
    write_wan(tmp_path / "wan", **TWO)
    used, done = [], []
    make_program = sampler.make_program

    def make(*arguments):
        program = make_program(*arguments)

        def run(params, *rest):
            used.append(
                (jax.tree.leaves(params["backbone"])[0], len(done))
            )  # an array that is kept has an id of its own
            return program(params, *rest)

        return run

    monkeypatch.setattr(sampler, "make_program", make)
    pipeline = dit_video.load(tmp_path / "wan", dtype="float32", offload=offload)
    requests = [Request("a dog", (1, 16, 16), seed=seed) for seed in range(6)]
    sampling = pipeline.make_sampling(steps=4, guidance=1.0)
    entries = write_samples(pipeline, requests, tmp_path / "samples", sampling=sampling, progress=done.append)
    assert done == [1, 2, 3, 4, 5, 6]
    ids = [id(leaf) for leaf, _ in used]
    first, *_, last = ids
    if offload is None:
        assert [count for _, count in used] == [0] * 8 + [4] * 4
        assert ids == [first] * 4 + [last] * 4 + [first] * 2 + [last] * 2
    else:
        assert [count for _, count in used] == [0] * 12
        assert ids == [first] * 6 + [last] * 6
    clips = pipeline.generate_many(requests, sampling=sampling)
    for entry, clip in zip(entries, clips, strict=True):
        np.testing.assert_array_equal(decode(tmp_path / "samples" / entry["file"]).frames, clip.frames)


def test_an_interrupted_sampling_goes_on(tiny_pipeline, tmp_path):
    """Files that exist are not made again; a stop leaves those that were made."""
    requests = [Request("a red circle", Grid(1, 16, 16), seed=seed) for seed in range(6)]

    def stop(count):
        if count == 5:
            raise KeyboardInterrupt

    folder = SampleFolder(tmp_path / "samples", tiny_pipeline, requests)
    with pytest.raises(KeyboardInterrupt):
        folder.fill(stop)
    assert SampleFolder(tmp_path / "samples", tiny_pipeline, requests).list_missing() == [5]
    contents = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "samples").glob("*.png")}
    done = []
    samples = SampleFolder(tmp_path / "samples", tiny_pipeline, requests).fill(done.append)
    assert done == [6]
    assert contents.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "samples").iterdir()}.items()
    assert len(samples.names) == len(open_clip_set(tmp_path / "samples").names) == 6


def test_samples_that_were_made_otherwise_are_refused(tiny_pipeline, tmp_path):
    requests = [Request(f"prompt {number}", Grid(1, 16, 16), number) for number in range(3)]
    SampleFolder(tmp_path / "samples", tiny_pipeline, requests[:2])
    SampleFolder(tmp_path / "samples", tiny_pipeline, requests[:2])
    with pytest.raises(UserError, match=r"2 samples there and 3 here, settings\.codec\[1\] is None there") as error:
        SampleFolder(tmp_path / "samples", tiny_pipeline, requests, crf=3)
    assert "prompt 0" not in str(error.value)
    other = [requests[0], Request("prompt 1", Grid(1, 16, 16), 1, noise=np.zeros((1, 2, 2, 4), np.float32))]
    with pytest.raises(UserError, match=r"made otherwise: requests\[1\]\.noise"):
        SampleFolder(tmp_path / "samples", tiny_pipeline, other)


def test_samples_of_another_model_or_other_conditioning_are_refused(tmp_path):
    """They have the same weights: the denoiser's say nothing of the autoencoder, the process or a request's values."""
    config = make_config(steps=1)
    config = replace(config, model=config.model.replace_backbone(conditioning=(MotionVectors(),)))
    params = make_params(config)

    def open_folder(motion=(2.0, 0.0), model=config.model, params=params):
        pipeline = Pipeline(replace(config, model=model), **params)
        request = Request("a red circle", Grid(1, 16, 16), conditioning={"motion": motion})
        return SampleFolder(tmp_path / "samples", pipeline, [request])

    open_folder()
    open_folder()
    other = jax.tree.map(lambda each: each + 1, params["autoencoder"])
    shifted = replace(config.model, process=replace(config.model.process, shift=9.0))
    for changes, difference in (
        ({"motion": (-9.0, 5.0)}, r"requests\[0\].conditioning.motion\[0\] is 2.0 there and -9.0 here"),
        ({"params": params | {"autoencoder": other}}, r"settings\.model\.autoencoder is"),
        ({"model": shifted}, r"settings\.model\.config\.process\.shift is .* there and 9.0 here"),
    ):
        with pytest.raises(UserError, match=difference):
            open_folder(**changes)


def test_samples_are_continued_whose_guidance_was_written_as_fields(tiny_pipeline, tmp_path):
    """Before guidance had names, it was written as `scale`, `image_scale`, `projection` and `zero_star`."""
    sampling = tiny_pipeline.make_sampling(steps=2, guidance=3.0)
    SampleFolder(tmp_path, tiny_pipeline, REQUESTS, sampling=sampling)
    written = json.loads((tmp_path / "settings.json").read_text())
    guidance = written["settings"]["sampling"]["guidance"]
    del guidance["scales"], guidance["method"]
    guidance |= {"scale": 3.0, "image_scale": None, "projection": None, "zero_star": None}
    (tmp_path / "settings.json").write_text(json.dumps(written))
    SampleFolder(tmp_path, tiny_pipeline, REQUESTS, sampling=sampling)
    guidance["scale"] = 4.0
    (tmp_path / "settings.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"sampling\.guidance\.scales\.text is 4\.0 there and 3\.0 here"):
        SampleFolder(tmp_path, tiny_pipeline, REQUESTS, sampling=sampling)


def test_tasks_and_requests_are_sampled_into_one_folder(tiny_pipeline, tmp_path):
    clip = tiny_pipeline.generate("a red circle", size=(5, 16, 16), steps=1)
    entries = [
        TaskEntry(Extend(clip, "a blue square", frames=4), Request("", seed=3)),
        Request("a red circle", Grid(5, 16, 16), seed=1),
        TaskEntry(ZoomOut(replace(clip[:1], fps=1), "a red circle", frames=2, factor=2.0), Request("", seed=4)),
    ]
    sampling = tiny_pipeline.make_sampling(steps=1)
    with pytest.warns(UserWarning, match="not trained"):
        samples = SampleFolder(tmp_path, tiny_pipeline, entries, sampling=sampling, codec="apng").fill()
    expected = [
        tiny_pipeline.run(entries[0].task, seed=3, steps=1),
        tiny_pipeline.generate("a red circle", size=(5, 16, 16), seed=1, steps=1),
        tiny_pipeline.run(entries[2].task, seed=4, steps=1),
    ]
    for number, clip in enumerate(expected):
        np.testing.assert_array_equal(samples.read(number, None).frames, clip.frames)
        assert read_recipe(tmp_path / samples.names[number]) == clip.recipe
    listed = json.loads((tmp_path / "prompts.json").read_text())
    assert [(each.get("task"), each["seed"]) for each in listed] == [("extend", 3), (None, 1), ("zoom_out", 4)]
    assert read_entries(tmp_path / "prompts.json") == entries
    assert write_contact_sheet(samples) == tmp_path / "contact_sheet.png"
    assert SampleFolder(tmp_path, tiny_pipeline, entries, sampling=sampling, codec="apng").list_missing() == []


def test_a_full_disk_leaves_the_finished_samples(tiny_pipeline, tmp_path, monkeypatch):
    requests, saved, save = [Request("a red circle", Grid(1, 16, 16), seed=seed) for seed in range(6)], [], Clip.save

    def save_some(self, path, **options):
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(self, path, **options)

    monkeypatch.setattr(Clip, "save", save_some)
    with pytest.raises(UserError, match=r"cannot be written after 3 samples .*No space left.*Free space"):
        SampleFolder(tmp_path / "out", tiny_pipeline, requests).fill()
    assert sorted((tmp_path / "out").glob("*.png")) == saved


def test_a_contact_sheet_has_a_row_for_each_clip():
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    sheet = make_contact_sheet([Clip(frames, 8), Clip(frames[:1, :8], 8)])
    assert sheet.frames.shape == (1, 2 * 18, 6 * 18, 3)
    np.testing.assert_array_equal(sheet.frames[0, 18:26, :16], frames[0, :8])
