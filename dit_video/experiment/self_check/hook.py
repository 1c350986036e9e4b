"""The hook that checks a training of a denoiser while it runs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_video.core.trees import flatten
from dit_video.data.packing.plan import RowPlanner
from dit_video.data.rows import RowStream
from dit_video.distributed import make_shardings
from dit_video.distributed.faults.progress import declare_phase
from dit_video.experiment.self_check import data_checks, objective_checks, student_checks
from dit_video.experiment.self_check.context_checks import check_context_parallel
from dit_video.experiment.self_check.model_checks import Gradient, GradientProbe, check_gradient, check_model, perturb
from dit_video.experiment.self_check.step_checks import (
    UpdateCheck,
    ValueReader,
    check_adapter_paths,
    check_adapter_scale,
    check_changes,
    check_gradient_norm,
    check_initial_weights,
    read_state_values,
    to_state_values,
    write_state_values,
)
from dit_video.experiment.self_check.subject import FILE, CheckedTraining, Problem, ProblemLog
from dit_video.tokens import PackedBatch
from dit_video.training.digests import compute_digests
from dit_video.training.hooks.hook import Hook
from dit_video.training.losses.distillation import StudentStep
from dit_video.training.step import GradientStep

STATE_FILE = "self_check_state.json"
"""Values of the newest saved state, from which the first update after a restart is checked."""
_ROW_STEPS = 4
"""Number of first batches whose rows are checked."""
_STATISTICS_STEPS = 8
"""Number of first batches whose latents' statistics are checked."""
_CHANGE_STEPS = 3, 20
"""Steps after a start between which parameters must have changed."""
_UPDATE_STEPS = 2, 11, 40
"""Steps after a start whose updates are checked."""
_INTERVAL = 2500
"""Interval in steps of checking an update and the rows of a batch later on."""


class CheckedBatches(Iterator[PackedBatch]):
    """Batches of a training: the newest one stays readable, and the next one can be read ahead."""

    def __init__(self, batches: RowStream, start: int):
        self.source = batches
        self._waiting: list[PackedBatch] = []
        self._start = start
        self.count = 0
        """Number of batches taken."""
        self.last: PackedBatch | None = None
        self.previous: PackedBatch | None = None

    @property
    def hash(self) -> str:
        """Return the hash of the data plan."""
        return self.source.hash

    @property
    def step(self) -> int:
        """Return the number of the newest batch in the plan, from 0."""
        return self._start + self.count - 1

    def __next__(self) -> PackedBatch:
        rows = self._waiting.pop() if self._waiting else next(self.source)
        self.previous, self.last = self.last, rows
        self.count += 1
        return rows

    def peek(self) -> PackedBatch:
        """Return the next batch without taking it."""
        if not self._waiting:
            self._waiting.append(next(self.source))
        return self._waiting[0]

    def close(self) -> None:
        """Stop what reads ahead."""
        self._waiting.clear()
        self.source.close()


class SelfCheck(Hook):
    """Checks of a training's data, model and objective after its first step, and of its steps from then on."""

    name = "self_check"

    def __init__(self, subject: CheckedTraining, *, is_new: bool):
        self._subject, self._is_new = subject, is_new
        self._folder: Path = subject.trainer.folder
        self._is_first_process = jax.process_index() == 0
        self._log = ProblemLog(self._folder / FILE, process=jax.process_index())
        self._batches: CheckedBatches | None = None
        self._start = 0
        self._tokens: list[np.ndarray] = []
        self._used: dict[str, Mapping[str, bool]] = {}
        """Whether the loss of each network depends on its parameters."""
        self._digests: tuple[int, Mapping[str, Mapping[str, int]]] | None = None
        self._before: Any = None
        self._gradient: Gradient | None = None
        self._probe: GradientProbe | None = None

    def watch(self, batches: RowStream, start: int) -> CheckedBatches:
        """Return the same batches, which this hook sees; `start` is the step of the first one."""
        self._batches = CheckedBatches(batches, start)
        return self._batches

    def resume(self, step: int) -> None:
        self._start = step

    def on_step(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        batches, done = self._batches, step - self._start
        if batches is None or batches.last is None:
            return
        if done == 1:
            with declare_phase("self-check"):
                self._log.add(step, self._check_start(step, state, batches))
        self._log.add(step, self._check_batch(done, step, batches), is_local=True)
        self._log.add(step, self._check_step(done, step, state, metrics, batches))

    def before_save(self, step: int, state: Any) -> None:
        if step > self._start:
            values = self._reader.read(state)
            if self._is_first_process:
                write_state_values(self._folder / STATE_FILE, step, values)

    def _check_start(self, step: int, state: Any, batches: CheckedBatches) -> list[Problem]:
        """Run all checks that need no second step. The first process checks the files, all check the model."""
        subject, problems = self._subject, list[Problem]()
        assert batches.last is not None
        if self._is_first_process:
            for check in (
                data_checks.check_held_out,
                data_checks.check_frames,
                data_checks.check_latents,
                data_checks.check_text_embeddings,
            ):
                problems += check(subject)
            problems += data_checks.check_order(batches.source.planner)
        # Weights without zeros, on the same devices.
        params = subject.jit(perturb, make_shardings(state.params, subject.trainer.mesh))(state.params)
        rows = batches.last
        problems += objective_checks.check_target(subject)
        problems += check_model(subject, params, rows)
        problems += check_context_parallel(subject, params, rows)
        problems += objective_checks.check_precision(state)
        problems += check_adapter_paths(subject, state.params)
        self._reader = ValueReader(subject, state.params)
        train_step = subject.trainer.train_step
        if isinstance(train_step, GradientStep):
            draws = objective_checks.draw_numbers(subject, rows)
            problems += objective_checks.check_noise(draws)
            problems += objective_checks.check_times(subject, draws)
            problems += objective_checks.check_caption_dropout(subject, draws)
            self._probe = probe = GradientProbe(subject, train_step.loss, self._reader, state.params)
            problems += objective_checks.check_loss_mean(
                lambda rows, step: probe.compute_loss(params, rows, step), rows, draws
            )
            gradient_problems, self._used["model"] = check_gradient(subject, probe, params, rows)
            problems += gradient_problems
            if subject.trained.lora is not None and subject.training.accumulation_steps == 1:
                problems += check_adapter_scale(subject, params, rows, probe.compute_loss(params, rows, 0))
        elif isinstance(train_step, StudentStep):
            moved = student_checks.find_moved(subject, train_step, state, rows)
            problems += student_checks.check_moved(subject, moved)
            self._used = {name: gradients[name] for name, gradients in moved.items()}
            problems += student_checks.check_times(subject, train_step, rows)
        if batches.step != step - 1 - subject.trainer.start_step:
            message = f"step {step} is trained on the batch of step {batches.step + 1 + subject.trainer.start_step}"
            problems.append(Problem("resume", message))
        return problems + self._check_restart(step, state)

    def _check_restart(self, step: int, state: Any) -> list[Problem]:
        """Check the first update: from the initial weights, or from those that were saved."""
        values = self._reader.read(state)
        if self._is_new:
            return check_initial_weights(self._subject, self._reader, values, self._subject.trained.frozen_params)
        saved = read_state_values(self._folder / STATE_FILE)
        if saved is None or saved[0] != step - 1:
            return []
        problems = UpdateCheck(self._subject, saved[1], values, step=step).find_problems()
        return [Problem("resume", f"{each.check}: {each.message}") for each in problems]

    def _check_batch(self, done: int, step: int, batches: CheckedBatches) -> list[Problem]:
        problems: list[Problem] = []
        rows = batches.last
        assert rows is not None
        if done <= _ROW_STEPS or step % _INTERVAL == 0:
            planner = batches.source.planner
            if isinstance(planner, RowPlanner):
                entries = [row.entries for row in batches.source.get_rows(batches.step)]
                problems += data_checks.check_rows(self._subject, rows, entries)
                problems += data_checks.check_repeated_examples(entries) if planner.sampler is None else []
            if batches.previous is not None:
                problems += data_checks.check_repetition(batches.previous, rows, step)
        if done <= _STATISTICS_STEPS:
            self._tokens.append(np.asarray(rows.tokens)[np.asarray(rows.segments) > 0])
        if done == _STATISTICS_STEPS:
            problems += data_checks.check_latent_statistics(self._subject, np.concatenate(self._tokens))
            self._tokens.clear()
        return problems

    def _check_step(
        self, done: int, step: int, state: Any, metrics: Mapping[str, Any], batches: CheckedBatches
    ) -> list[Problem]:
        problems: list[Problem] = []
        if self._before is not None:
            before, gradient = to_state_values(self._before), self._gradient
            self._before = self._gradient = None
            check = UpdateCheck(self._subject, before, self._reader.read(state), step=step)
            if gradient is None:
                problems += check.find_problems()
            else:
                problems += check.find_problems(gradient.values, gradient.norm)
                logged = float(jax.device_get(metrics["gradient_norm"]))
                problems += check_gradient_norm(logged, gradient.norm, step=step)
        if done + 1 in _UPDATE_STEPS or step % _INTERVAL == 0:
            self._before = self._reader.read_later(state)
            if self._probe is not None and done + 1 in _UPDATE_STEPS:
                self._gradient = self._probe.compute(state.params, batches.peek(), step)
        if done == _CHANGE_STEPS[0]:
            self._digests = step, self._compute_digests(state)
        elif done == _CHANGE_STEPS[1] and self._digests is not None:
            first, digests = self._digests
            for name, last in self._compute_digests(state).items():
                used = self._used.get(name, {})
                problems += check_changes(self._subject, digests[name], last, used, steps=step - first, name=name)
        return problems

    def _compute_digests(self, state: Any) -> Mapping[str, Mapping[str, int]]:
        """Return the digests of all that is trained, by the name of the network."""
        step, trained = self._subject.trainer.train_step, {"model": state.params}
        if isinstance(step, StudentStep):
            params = step.get_params(state)
            trained = {name: params[name] for name in step.losses}
        return {name: compute_digests(flatten(params)) for name, params in trained.items()}
