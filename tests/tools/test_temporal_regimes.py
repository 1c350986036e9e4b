"""The comparison of ways to a video model."""

from pathlib import Path

import pytest

from dit_video.core.files import read_json, write_json
from dit_video.core.trees import flatten
from dit_video.experiment import AllWeights, TemporalWeights
from dit_video.models.backbones.conversion import grow_config
from dit_video.nn import get_param_shapes


@pytest.fixture
def tool(load_file):
    return load_file(Path(__file__).parents[2] / "tools" / "temporal_regimes.py")


@pytest.mark.parametrize(
    ("regime", "kind"), [("temporal", TemporalWeights), ("full", AllWeights), ("scratch", AllWeights)]
)
def test_video_models_of_both_layouts_grow_from_the_image_model_and_are_as_large(tool, regime, kind, tmp_path):
    images = tool.make_experiment(tool.Training("images", "", 1), tmp_path, steps=40)
    sizes = []
    for layers, group in tool.LAYERS.items():
        experiment = tool.make_experiment(tool.Training(regime, layers, 1), tmp_path, steps=40)
        backbone, train = experiment.model.backbone, experiment.denoiser.train
        assert grow_config(images.model.backbone, backbone) == backbone
        assert (backbone.temporal.spatial_layers, backbone.temporal.layers) == (group, group)
        assert isinstance(train, kind)
        assert train.init_from == (None if regime == "scratch" else str(tmp_path / "images-1"))
        assert (experiment.data.max_frames, images.data.max_frames) == (17, 1)
        sizes.append(sum(leaf.size for leaf in flatten(get_param_shapes(backbone.make)).values()))
    assert sizes[0] == sizes[1]


def test_the_autoencoder_is_trained_on_no_longer_windows_than_the_clips(tool, tmp_path):
    experiment = tool.make_autoencoder_experiment(tmp_path, steps=40)  # refuses longer ones
    assert max(window.size.t for window in experiment.autoencoder.windows) == 17
    assert experiment.autoencoder.steps == 40


def test_parts_in_several_processes_keep_each_others_results(tool, tmp_path, monkeypatch):
    file, carried_out = tmp_path / "r.json", []

    def carry_out(training, *args):
        carried_out.append(training.name)
        if training.regime == "images":  # while the part of another process ends
            write_json(file, read_json(file) | {"results": [{"name": "other"}]})
        return {"name": training.name}

    monkeypatch.setattr(tool, "_train", lambda *args: None)
    monkeypatch.setattr(tool, "_measure_steps", lambda trainings, *args: {each.way: 1.0 for each in trainings})
    monkeypatch.setattr(tool, "_carry_out", carry_out)
    monkeypatch.setattr(tool, "print_table", lambda results: None)
    tool.main(data=tmp_path, out=tmp_path, json=file, seeds=1, part=0)
    assert [result["name"] for result in read_json(file)["results"]] == ["other", *carried_out]
    tool.main(data=tmp_path, out=tmp_path, json=file, seeds=1)
    assert len(carried_out) == len(set(carried_out)) == len(read_json(file)["results"]) - 1


def test_the_table_has_the_mean_and_the_range_of_each_way(tool, capsys):
    values = {"steps": 100, "scene_colours": 0.5, "scene_directions": 0.25, "scene_distance": 2.0}
    results = [
        {"regime": "images", "layers": "", "steps": 90},
        {"regime": "full", "layers": "grouped", **values},
        {"regime": "full", "layers": "grouped", **values, "scene_colours": 0.7},
    ]
    tool.print_table(results)
    *_, row = capsys.readouterr().out.strip().splitlines()
    assert row == "| full | grouped | 100 (100 to 100) | 0.6 (0.5 to 0.7) | 0.25 (0.25 to 0.25) | 2 (2 to 2) |"
