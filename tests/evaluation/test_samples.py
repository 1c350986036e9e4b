"""Samples in a folder, and the list of their requests."""

import json

import jax
import numpy as np
import pytest

import dit_video
from dit_video.core.errors import UserError
from dit_video.core.offload import Stages
from dit_video.distributed.faults.progress import PROGRESS
from dit_video.evaluation.sample_store import SampleStore
from dit_video.evaluation.samples import read_samples, write_samples
from dit_video.sampling import sampler
from dit_video.sampling.pipeline import Request
from dit_video.sampling.request_file import read_requests
from dit_video.tokens import Grid
from dit_video.video import Clip, decode
from support.tiny_wan import SIZE, TWO, write_animating_wan, write_wan

REQUESTS = [
    Request("a red circle moving left", Grid(9, 16, 32), seed=1),
    Request("a blue square", Grid(1, 16, 16), seed=2),
    Request("a white triangle moving up", Grid(5, 16, 16), seed=3, negative="a red circle"),
]


def test_samples_are_files_of_the_stated_sizes(tiny_pipeline, tmp_path):
    done = []
    entries = write_samples(tiny_pipeline, REQUESTS, tmp_path / "samples", progress=done.append)
    assert done == [1, 2, 3]
    assert json.loads((tmp_path / "samples" / "prompts.json").read_text()) == entries
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
        *(entry["file"] for entry in entries),
    }
    assert read_requests(tmp_path / "samples" / "prompts.json") == REQUESTS
    read = read_samples(tmp_path / "samples")
    assert [entry for entry, _ in read] == entries
    assert [clip.caption for _, clip in read] == [request.prompt for request in REQUESTS]


def test_samples_count_as_progress(tiny_pipeline, tmp_path):
    """In a run of several processes the others wait for those that the first one writes."""
    seen = [PROGRESS.changes]
    sampling = tiny_pipeline.make_sampling(steps=1)
    watch = {"progress": lambda _: seen.append(PROGRESS.changes)}
    write_samples(tiny_pipeline, REQUESTS[1:], tmp_path / "a", sampling=sampling, **watch)
    assert seen == sorted(set(seen))
    before = PROGRESS.changes
    SampleStore(tmp_path / "b", REQUESTS[1:], {}).fill(tiny_pipeline, sampling=sampling)
    assert PROGRESS.changes - before >= 2


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
    assert {path.name for path in folder.iterdir()} == {"prompts.json", "000-a-blue-square.png"}
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
        write_samples(tiny_pipeline, read_requests(tmp_path / "prompts.json"), tmp_path)
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
    again = read_requests(tmp_path / "first" / "prompts.json")
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
