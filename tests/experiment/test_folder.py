"""The folder of a run is opened only where it holds a run of this version."""

import dataclasses
import json
import re
import runpy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import dit_video
from dit_video.core import config_json, registry
from dit_video.core.errors import MissingError, UserError
from dit_video.data.buckets import BatchMemory, BucketConfig
from dit_video.distributed import Parallelism
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.experiment import Experiment, Stage
from dit_video.experiment.config_file import load_experiment
from dit_video.experiment.run import Run
from dit_video.training.checkpoint import CheckpointPolicy
from dit_video.training.hooks.logging import read_metrics
from dit_video.training.hooks.metric_logs import MonitoringConfig

TINY = Path(__file__).parents[1] / "support" / "tiny.py"


def test_a_folder_with_other_files_is_refused_and_left_alone(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        Run.create(tmp_path, tiny.EXPERIMENT)
    with pytest.raises(UserError, match="is a file"):
        Run.create(tmp_path / "thesis.tex", tiny.EXPERIMENT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_rendered_clips_may_lie_in_a_new_run_s_folder(tiny, tmp_path):
    (tmp_path / "clips").mkdir()
    Run.create(tmp_path, tiny.EXPERIMENT)
    assert (tmp_path / "experiment.json").is_file()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"format": 0, "experiment": {}}, "run of format 0, this version reads 1"),
        ([], "run of format None"),
        ({"format": 1}, "holds no experiment"),
        ({"format": 1, "experiment": {"type": "os:system", "command": "x"}}, "lies outside dit_video"),
        ({"format": 1, "experiment": {"type": "dit_video.sampling:Sampling"}}, "holds no experiment"),
        ({"format": 1, "experiment": {"type": "dit_video.experiment:Gone"}}, "does not exist in this version"),
        ({"format": 1, "experiment": {"type": "dit_video.experiment:DataConfig", "pixels": 1}}, "no field pixels"),
    ],
)
def test_another_version_s_run_is_refused(tmp_path, document, message):
    (tmp_path / "experiment.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=message) as error:
        Run.open(tmp_path)
    assert "\n" not in str(error.value)


def test_a_run_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(MissingError, match="no such run"):
        Run.open(tmp_path / "nowhere")


# Clips.


@pytest.fixture
def copy(tiny_run, tmp_path):
    """Return a copy of a finished run."""
    return shutil.copytree(tiny_run, tmp_path / "run", symlinks=True)


def read_amendments(folder) -> list[dict]:
    return json.loads((folder / "experiment.json").read_text()).get("amendments", [])


def unfinish(folder, step: int = 0) -> None:
    """Remove the results of a run, and its checkpoints after a step."""
    shutil.rmtree(folder / "pipeline")
    for checkpoint in (folder / "denoiser" / "checkpoints").iterdir():
        if checkpoint.name.isdecimal() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)


def test_fields_that_do_not_change_what_is_trained_may_change_and_are_recorded(tiny, copy, capsys):
    changed = tiny.EXPERIMENT.replace_stage("denoiser", accumulation_steps=2)
    changed = changed.replace_backbone(attention="chunked", remat="full")
    data = dataclasses.replace(changed.data, workers=2)
    changed = dataclasses.replace(
        changed,
        data=data,
        parallel=Parallelism(data=1),
        save_every=2,
        log_every=1,
        preemption_grace=20.0,
        keep=CheckpointPolicy(newest=5),
        monitoring=MonitoringConfig(tensorboard=True),
    )
    unfinish(copy, step=8)
    before = (copy / "experiment.json").read_bytes()
    run = Run.create(copy, changed)
    assert (copy / "experiment.json").read_bytes() == before
    run.check()
    assert run.experiment == changed
    said = capsys.readouterr().err
    assert said.startswith("amended: ")
    assert "save_every 4 -> 2" in said
    reopened = Run.open(copy)
    assert reopened.experiment == changed
    (amendment,) = reopened.amendments
    assert amendment.steps == {"autoencoder": 8, "denoiser": 8}
    paths = {change.path: (change.old, change.new) for change in amendment.changes}
    assert paths["save_every"] == (4, 2)
    assert paths["model.backbone.attention"] == ("auto", "chunked")
    assert set(paths) == {
        "data.workers",
        "parallel.data",
        "save_every",
        "log_every",
        "preemption_grace",
        "keep.newest",
        "monitoring.tensorboard",
        "denoiser.accumulation_steps",
        "model.backbone.attention",
        "model.backbone.remat",
    }
    # A second amendment is recorded after the first, and the same config is none.
    Run.create(copy, changed).check()
    assert len(read_amendments(copy)) == 1
    Run.create(copy, tiny.EXPERIMENT).check()
    assert [len(each["changes"]) for each in read_amendments(copy)] == [10, 10]


@pytest.mark.parametrize(
    "change",
    [
        lambda experiment: dataclasses.replace(experiment, seed=1),
        lambda experiment: dataclasses.replace(experiment, name="another"),
        lambda experiment: experiment.replace_stage("denoiser", batch=4),
        lambda experiment: experiment.replace_stage("denoiser", ema_decay=0.5),
        lambda experiment: experiment.replace_stage("denoiser", caption_dropout=0.5),
        lambda experiment: experiment.replace_stage(
            "denoiser", optimizer=dataclasses.replace(experiment.denoiser.optimizer, learning_rate=1e-4)
        ),
        lambda experiment: dataclasses.replace(
            experiment, data=dataclasses.replace(experiment.data, captions={"text": 1.0})
        ),
        lambda experiment: experiment.replace_backbone(dtype="bfloat16"),
    ],
)
def test_fields_that_change_what_is_trained_are_refused(tiny, copy, change):
    before = (copy / "experiment.json").read_bytes()
    changed = dataclasses.replace(change(tiny.EXPERIMENT), save_every=7)
    with pytest.raises(UserError, match="holds a run of another config") as error:
        Run.create(copy, changed)
    assert "save_every" not in str(error.value)
    assert (copy / "experiment.json").read_bytes() == before


def test_steps_may_not_end_before_the_newest_checkpoint(tiny, copy):
    with pytest.raises(UserError, match=r"would end at step 7, and the newest checkpoint is step 10. Use 3 steps more"):
        Run.create(copy, tiny.EXPERIMENT.replace_stage("denoiser", steps=7))
    with pytest.raises(UserError, match=r"autoencoder\.steps of the run .* cannot change: its autoencoder is trained"):
        Run.create(copy, tiny.EXPERIMENT.replace_stage("autoencoder", steps=20))
    (copy / "autoencoder" / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"autoencoder\.steps=7 is too small: the newest checkpoint is step 8"):
        Run.create(copy, tiny.EXPERIMENT.replace_stage("autoencoder", steps=7))
    assert (copy / "pipeline").is_dir()
    assert read_amendments(copy) == []


def test_the_mesh_may_not_change_the_size_of_bucket_batches(tiny):
    buckets = BucketConfig(memory=BatchMemory(fixed=1, per_token=10), budget=2000)
    data = dataclasses.replace(tiny.EXPERIMENT.data, cache_latents=False)
    bucketed = dataclasses.replace(tiny.EXPERIMENT, data=data).replace_stage("denoiser", buckets=buckets)
    assert set(tiny.EXPERIMENT.amendable_fields) - set(bucketed.amendable_fields) == {"parallel", "denoiser.parallel"}


def test_the_steps_of_a_finished_stage_of_the_curriculum_may_not_change(tiny, copy):
    def make(first: int, second: int) -> Experiment:
        autoencoder, denoiser = tiny.EXPERIMENT.stages
        one = dataclasses.replace(denoiser, name="one", steps=first)
        two = dataclasses.replace(denoiser, name="two", steps=second, continues="one")
        last = dataclasses.replace(denoiser, continues="two")
        return dataclasses.replace(tiny.EXPERIMENT, stages=(autoencoder, one, two, last))

    unfinish(copy, step=8)
    document = json.loads((copy / "experiment.json").read_text())
    document["experiment"] = config_json.to_json(make(4, 8))
    (copy / "experiment.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"one\.steps cannot change: its stage ended at step 4"):
        Run.create(copy, make(5, 8))
    with pytest.raises(UserError, match=r"two\.steps is too small: its stage would end at step 7"):
        Run.create(copy, make(4, 3))
    assert Run.create(copy, make(4, 9)).experiment.get_stage("two").steps == 9


@pytest.mark.slow
def test_a_finished_run_trains_on_with_more_steps(tiny, tiny_clips, copy):
    before = (copy / "pipeline" / "denoiser.safetensors").read_bytes()
    run = Run.create(copy, tiny.EXPERIMENT.replace_stage("denoiser", steps=12))
    assert (copy / "pipeline" / "denoiser.safetensors").read_bytes() == before  # until there is a better one
    run.train(tiny_clips)
    assert [entry["step"] for entry in read_metrics(copy / "denoiser" / "metrics.jsonl")][-2:] == [10, 12]
    assert (copy / "pipeline" / "denoiser.safetensors").read_bytes() != before


def test_the_pipeline_of_a_finished_run_has_amended_defaults(tiny, tiny_clips, copy):
    before = (copy / "pipeline" / "denoiser.safetensors").read_bytes()
    Run.create(copy, dataclasses.replace(tiny.EXPERIMENT, save_every=3))
    assert (copy / "pipeline").is_dir()
    sampling = dataclasses.replace(tiny.EXPERIMENT.sampling, steps=3)
    evaluation = CaptionEvaluation()
    shutil.rmtree(copy / "latents")  # a finished run needs none
    changed = dataclasses.replace(tiny.EXPERIMENT, sampling=sampling, evaluation=evaluation)
    run = Run.create(copy, changed)
    run.train(tiny_clips)
    pipeline = run.load_pipeline()
    assert pipeline.config.sampling.steps == 3
    assert pipeline.config.evaluation == evaluation != tiny.EXPERIMENT.evaluation
    assert not (copy / "latents").exists()
    assert (copy / "pipeline" / "denoiser.safetensors").read_bytes() == before


def test_a_finished_run_without_checkpoints_keeps_its_pipeline(tiny, copy):
    shutil.rmtree(copy / "denoiser" / "checkpoints")
    with pytest.raises(UserError, match="its denoiser has no checkpoints any more"):
        Run.create(copy, tiny.EXPERIMENT.replace_stage("denoiser", steps=12))
    assert Run.create(copy, tiny.EXPERIMENT).stages[-1].is_done(Run.open(copy))
    assert (copy / "pipeline").is_dir()
    assert read_amendments(copy) == []


@registry.register
@dataclass(frozen=True, kw_only=True)
class CountClips(Stage):
    """A stage of another package, which may be told anew how it reports."""

    name: str = "count"
    every: int = 1
    seed: int = 0
    amendable_fields: ClassVar[tuple[str, ...]] = ("every",)
    output = "count.txt"

    def run(self, run: Run) -> None:
        path = self.get_output(run)
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(len(run.clips)))


def test_stages_of_other_packages_name_their_own_fields(tiny, tmp_path):
    stages = tiny.EXPERIMENT.stages
    experiment = dataclasses.replace(tiny.EXPERIMENT, stages=(*stages, CountClips()))
    run = Run.create(tmp_path / "run", experiment)
    (run.folder / "count").mkdir()
    amended = experiment.replace_stage("count", every=5)
    assert Run.create(run.folder, amended).experiment == amended
    with pytest.raises(UserError, match=r"another config \(count\.seed is 0 there and 1 here\)"):
        Run.create(run.folder, experiment.replace_stage("count", seed=1))


def test_a_stage_that_names_no_output_is_refused(tiny, tmp_path):
    class Endless(Stage):
        name = "endless"

        def run(self, run: Run) -> None: ...

    run = Run.create(tmp_path / "run", tiny.EXPERIMENT)
    with pytest.raises(UserError, match="the stage endless is never done: Endless lacks output"):
        Endless().is_done(run)


def test_a_run_of_a_class_that_its_config_file_defines_is_refused(script, tmp_path):
    """Another process, such as the one that samples it, could not read its config."""
    config = tmp_path / "config.py"
    config.write_text(
        f"""
import dataclasses
import runpy
from dit_video.core.registry import register
from dit_video.sampling import Sampling

@register
class LongSampling(Sampling):
    steps: int = 1000

TINY = runpy.run_path({str(TINY)!r})["EXPERIMENT"]
EXPERIMENT = dataclasses.replace(TINY, sampling=LongSampling())
"""
    )
    run, message = tmp_path / "run", r":LongSampling' is invalid: .* Use a module that can be imported"
    with pytest.raises(UserError, match=message):
        load_experiment(config)
    with pytest.raises(UserError, match=message):
        Run.create(run, runpy.run_path(str(config))["EXPERIMENT"])
    ended = script("experiments/train.py", config, "--data", tmp_path, "--workdir", run)
    assert ended.code == 2
    assert re.search(message, ended.err)
    assert not run.exists()


@pytest.mark.slow
def test_a_clone_writes_configs_without_metadata_of_a_package(tmp_path, process):
    ended = process("tests/support/programs/clone.py", tmp_path / "run")
    assert (ended.code, ended.out) == (0, f"{dit_video.__version__}\n"), ended.err
    assert json.loads((tmp_path / "run" / "experiment.json").read_text())["version"] == dit_video.__version__


def test_a_stage_does_not_speak_for_another(tiny):
    @registry.register
    @dataclass(frozen=True, kw_only=True)
    class StrictStage(CountClips):
        name: str = "strict"
        amendable_fields: ClassVar[tuple[str, ...]] = ()

    experiment = dataclasses.replace(tiny.EXPERIMENT, stages=(*tiny.EXPERIMENT.stages, StrictStage(), CountClips()))
    assert [field for field in experiment.amendable_fields if field.startswith(("strict", "count"))] == ["count.every"]
