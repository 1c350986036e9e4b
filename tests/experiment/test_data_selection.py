"""Selection of training clips by columns of the data set, and captions from several columns."""

import dataclasses
import shutil
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from dit_video.core.errors import UserError
from dit_video.data.clips import ClipSource
from dit_video.data.tables import write_column
from dit_video.experiment import input_pipeline
from dit_video.experiment.run import Run


@pytest.fixture
def dataset(tiny_run, tmp_path):
    """Return a data set with a column of scores, and one of captions that some clips have."""
    folder = shutil.copytree((tiny_run / "data").resolve(), tmp_path / "data")
    infos = ClipSource(folder).infos
    write_column(folder, "score", {"name": [info.name for info in infos], "score": np.arange(len(infos))})
    named = [info.name for info in infos[::2]]
    write_column(folder, "long", {"name": named, "long": [[f"a long text about {name}"] for name in named]})
    return folder


def open_run(tiny, dataset, tmp_path, **data) -> Run:
    experiment = dataclasses.replace(tiny.EXPERIMENT, data=dataclasses.replace(tiny.EXPERIMENT.data, **data))
    run = Run.create(tmp_path / "run", experiment)
    run.take(dataset)
    return run


def test_a_condition_selects_training_clips_and_leaves_held_out_ones(tiny, dataset, tmp_path):
    run = open_run(tiny, dataset, tmp_path, where="score >= 10")
    expected = [info.name for number, info in enumerate(ClipSource(dataset).infos) if number >= 10]
    held_out = set(tiny.EXPERIMENT.data.held_out)
    assert [info.name for info in run.training_clips.infos] == [n for n in expected if n not in held_out]
    assert {info.name for info in run.held_out_clips.infos} == held_out


def test_a_condition_that_is_wrong_or_selects_nothing_ends_the_run_before_it_trains(tiny, dataset, tmp_path):
    names = tuple(info.name for info in ClipSource(dataset).infos)
    cases = (
        ({"where": "blur > 3"}, "there is no column blur"),
        ({"where": "score > 1000"}, "selects none of the"),
        ({"held_out": names}, f"none of the {len(names)} clips is left to train on: .* Hold out fewer"),
    )
    for number, (changes, message) in enumerate(cases):
        data = dataclasses.replace(tiny.EXPERIMENT.data, **changes)
        run = Run.create(tmp_path / str(number), dataclasses.replace(tiny.EXPERIMENT, data=data))
        with pytest.raises(UserError, match=message):
            run.train(dataset)
        assert not (tmp_path / str(number) / "autoencoder").exists()


def test_captions_are_drawn_from_columns_by_their_shares(tiny, dataset, tmp_path):
    """Three of four draws of a clip that has a long caption are of that."""
    run = open_run(tiny, dataset, tmp_path, captions={"captions": 0.25, "long": 0.75})
    clips = run.training_clips
    captions = input_pipeline.open_captions(lambda text: np.frombuffer(text.encode(), np.uint8), clips)
    draws: dict[int, Counter[int]] = {}
    for example in range(len(clips)):
        generator = np.random.default_rng(example)
        draws[example] = Counter(captions.lengths.draw(example, lambda g=generator: g) for _ in range(200))
    for example, info in enumerate(clips.infos):
        if len(info.captions) == 1:
            assert draws[example] == {0: 200}
        else:
            assert info.captions[1].startswith("a long text about")
            assert draws[example][1] == pytest.approx(150, abs=30)
    assert {len(info.captions) for info in clips.infos} == {1, 2}


@pytest.mark.parametrize(
    ("captions", "name"),
    [
        ({"a": -1.0}, "a"),
        ({"long": 1.0, "captions": 0.0}, "captions"),
        ({"long": float("nan")}, "long"),
        ({"long": float("inf"), "captions": 1.0}, "long"),
    ],
)
def test_shares_of_captions_that_cannot_be_drawn_by_are_refused(tiny, captions, name):
    with pytest.raises(UserError, match=rf"^data\.captions=.* is invalid: the share of {name} is .*\. Use .*\.$"):
        dataclasses.replace(tiny.EXPERIMENT.data, captions=captions)


def test_a_checkpoint_is_not_continued_on_other_data(tiny, tiny_run, tmp_path):
    copy = shutil.copytree(tiny_run, tmp_path / "run", symlinks=True)
    shutil.rmtree(copy / "pipeline")
    for newest in sorted((copy / "denoiser" / "checkpoints").iterdir(), key=lambda path: int(path.name))[-1:]:
        shutil.rmtree(newest)
    # A caption changes in the data set, and in the latents, which are brought up to date.
    for folder in ("data", "latents"):
        path = copy / folder / "columns" / "captions.parquet"
        table = pq.read_table(path)
        texts = [texts and [texts[0][::-1]] for texts in table["captions"].to_pylist()]
        position = table.column_names.index("captions")
        write_column(copy / folder, "captions", table.set_column(position, "captions", [texts]))
    with pytest.raises(UserError, match="differ from those of its checkpoint at step"):
        Run.open(copy).run_stages()
