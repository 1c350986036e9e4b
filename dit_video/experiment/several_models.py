"""Stages of an experiment with several models: a prior and its decoder, or a cascade of resolutions."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dit_video.core.errors import UserError
from dit_video.experiment.run import Experiment, Run, Stage
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import STEPS, PipelineConfig, PreviousStep, read_pipeline_config


@dataclass(frozen=True, kw_only=True)
class TrainModel(Stage):
    """Training of a model of its own, as a run in a folder of this one's, on the same ingested clips.

    The nested run has all that a run has: checkpoints, samples, a page, and a pipeline that `dit_video.load` opens. Its
    limits on clips, its devices and its seed are those of its experiment.
    """

    name: str
    experiment: Experiment

    @property
    def amendable_fields(self) -> tuple[str, ...]:
        return self.experiment.amendable_fields

    def check(self, run: Run) -> None:
        self.open_run(run).check(is_evaluated=find_join(run.experiment) is None)

    def is_done(self, run: Run) -> bool:
        nested = self.open_run(run)
        return all(stage.is_done(nested) for stage in nested.stages)

    def run(self, run: Run) -> None:
        if run.process == 0 and find_join(run.experiment) is not None:
            shutil.rmtree(run.folder / "pipeline", ignore_errors=True)  # joined of the weights before
        self.open_run(run).run_stages()

    def open_run(self, run: Run) -> Run:
        """Return the run of the model, which is created if need be."""
        return run.open_nested(self.name, self.experiment)


@dataclass(frozen=True, kw_only=True)
class JoinPipelines(Stage):
    """The pipeline of a model whose conditioning is sampled by the pipelines of other models, as the run's pipeline.

    Raises:
      UserError: If a name is not that of an earlier `TrainModel`, the last model lacks a conditioning, or the
        experiment trains a denoiser, too.
    """

    name: str = "join"
    last: str
    """Name of the stage of the model that makes the clips."""
    previous: Mapping[str, PreviousStep] = field(hash=False)
    """Steps that are sampled before, by the names of the stages of their models."""

    @property
    def amendable_fields(self) -> tuple[str, ...]:
        return ("last", "previous")

    def check_config(self, experiment: Experiment) -> None:
        if experiment.denoiser_stages:
            raise UserError("the run's pipeline is that of its denoiser. Train each model by a TrainModel(...).")
        stages = experiment.stages[: experiment.stages.index(self)]
        known = {stage.name: stage.experiment for stage in stages if isinstance(stage, TrainModel)}
        for name in (self.last, *self.previous):
            if name not in known:
                rule = f"no earlier stage trains a model of this name. Use one of {', '.join(known)}."
                raise UserError(f"{name!r} is invalid: {rule}")
        if (model := known[self.last].model) is not None:
            for step in self.previous.values():
                step.check(model)

    def check(self, run: Run) -> None:
        last = self._open_run(run, self.last)
        if run.process == 0 and last.experiment.denoiser_stages:  # not a run of several models, which checks its own
            last.check_evaluation(self.join_config(last.pipeline_config()))

    def is_done(self, run: Run) -> bool:
        folder = run.folder / "pipeline"
        folders = {folder / STEPS / step.name: name for name, step in self.previous.items()}
        if not all(each.is_dir() for each in (folder, *folders)):
            return False
        own = {each: read_pipeline_config(run.folder / name / "pipeline") for each, name in folders.items()}
        own[folder] = self.join_config(read_pipeline_config(run.folder / self.last / "pipeline"))
        return all(read_pipeline_config(each) == config for each, config in own.items())

    def run(self, run: Run) -> None:
        self.join(lambda name: self._open_run(run, name).load_pipeline()).save(run.folder / "pipeline")

    def _open_run(self, run: Run, name: str) -> Run:
        stage = run.experiment.get_stage(name)
        assert isinstance(stage, TrainModel)  # which check_config checks
        return stage.open_run(run)

    def join(self, load: Callable[[str], Pipeline]) -> Pipeline:
        """Return the joined pipelines of models, which a function loads by the names of their stages."""
        joined = load(self.last)
        for name, step in self.previous.items():
            joined = joined.add_previous_step(step, load(name))
        return joined

    def join_config(self, last: PipelineConfig) -> PipelineConfig:
        """Return the config of the joined pipeline, given that of the last model."""
        added = {step.name: step for step in self.previous.values()}
        kept = (step for step in last.previous if step.name not in added)
        return replace(last, previous=(*kept, *added.values()))


def find_join(experiment: Experiment) -> JoinPipelines | None:
    """Return the stage that joins the models of an experiment; None without one."""
    return next((stage for stage in experiment.stages if isinstance(stage, JoinPipelines)), None)


def list_models(run: Run) -> dict[str, Path]:
    """Return the folders of the runs that are nested in one, by the names of their models."""
    return {stage.name: run.folder / stage.name for stage in run.stages if isinstance(stage, TrainModel)}


def open_sampled_run(run: Run) -> Run:
    """Return the run whose model makes the clips: the last one of joined models, or the run of a single model.

    Raises:
      UserError: If a run of several models does not join them.
    """
    if (join := find_join(run.experiment)) is not None:
        return open_sampled_run(Run.open(run.folder / join.last))
    check_single(run)
    return run


def check_single(run: Run) -> None:
    """Check that a run is of a single model.

    Raises:
      UserError: If it is one of several.
    """
    if run.experiment.model is None and (models := list_models(run)):
        names = ", ".join(map(str, models.values()))
        raise UserError(f"{run.folder} is invalid here: it is a run of several models. Use one of {names}.")
