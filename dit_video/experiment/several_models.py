"""Stages of an experiment with several models: a prior and its decoder, or a cascade of resolutions."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dit_video.core.errors import UserError
from dit_video.experiment.run import Experiment, Run, Stage
from dit_video.sampling.pipeline_config import PreviousStep


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
        self.open_run(run).check()

    def is_done(self, run: Run) -> bool:
        nested = self.open_run(run)
        return all(stage.is_done(nested) for stage in nested.stages)

    def run(self, run: Run) -> None:
        self.open_run(run).run_stages()

    def open_run(self, run: Run) -> Run:
        """Return the run of the model."""
        return run.open_nested(self.name, self.experiment)


@dataclass(frozen=True, kw_only=True)
class JoinPipelines(Stage):
    """The pipeline of a model whose conditioning is sampled by the pipelines of other models, as the run's pipeline.

    Raises:
      UserError: If a name is not that of an earlier `TrainModel`, or the last model lacks a conditioning.
    """

    name: str = "join"
    last: str
    """Name of the stage of the model that makes the clips."""
    previous: Mapping[str, PreviousStep] = field(hash=False)
    """Steps that are sampled before, by the names of the stages of their models."""

    def check_config(self, experiment: Experiment) -> None:
        stages = experiment.stages[: experiment.stages.index(self)]
        known = {stage.name: stage.experiment for stage in stages if isinstance(stage, TrainModel)}
        for name in (self.last, *self.previous):
            if name not in known:
                rule = f"no earlier stage trains a model of this name. Use one of {', '.join(known)}."
                raise UserError(f"{name!r} is invalid: {rule}")
        if (model := known[self.last].model) is not None:
            for step in self.previous.values():
                step.check(model)

    def is_done(self, run: Run) -> bool:
        return (run.folder / "pipeline").is_dir()

    def run(self, run: Run) -> None:
        def load(name: str):
            stage = run.experiment.get_stage(name)
            assert isinstance(stage, TrainModel)  # which check_config checks
            return stage.open_run(run).load_pipeline()

        joined = load(self.last)
        for name, step in self.previous.items():
            joined = joined.add_previous_step(step, load(name))
        joined.save(run.folder / "pipeline")
