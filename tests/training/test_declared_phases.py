from dit_video.distributed.faults.progress import PROGRESS
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.hook import Hook, PeriodicCall
from dit_video.training.loop import LoopConfig, run
from support.loop_training import init_state, make_batches, step


def test_a_training_declares_all_but_its_steps_as_phases(monkeypatch, tmp_path):
    """A watch for hangs knows the steps of a training, and what it does besides."""
    seen = []

    def record(event):
        seen.append((event, *[work.name for work in PROGRESS.works[1:]]))

    def watched_step(state, batch):
        record("step")
        return step(state, batch)

    def sample(_step, _state):
        record("call")
        return {}

    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda *arguments, **options: (record("write"), save(*arguments, **options))[1]
    )
    run(
        watched_step,
        init_state(),
        make_batches,
        config=LoopConfig(steps=4, save_every=2),
        checkpoints=Checkpoints(tmp_path),
        hooks=[PeriodicCall(every=2, function=sample, name="sample")],
    )
    assert not PROGRESS.works
    assert seen == [
        ("step", "compile"),
        ("step",),
        ("call", "sample"),
        ("write", "save"),
        ("step",),
        ("step",),
        ("call", "sample"),
        ("write", "save"),
    ]


def test_logs_and_functions_after_a_step_may_take_as_long_as_a_step_and_compilation_an_hour():
    """Meanwhile all other processes wait, so a dead disk below a log must not hold them for the hours of a sample."""
    seen = {}

    class PhaseRecorder(Hook):
        name = "sample"

        def record(self, event):
            loop, phase = PROGRESS.works
            assert loop.name == "step"
            seen[event] = (phase.name, phase.limit)

        def is_due(self, step, *, is_last):
            return True

        def call(self, step, state):
            self.record("call")
            return {}

        def write(self, step, values):
            self.record("write")

        def on_step(self, step, state, metrics):
            self.record("on_step")

    hook = PhaseRecorder()

    def watched_step(state, batch):
        if len(PROGRESS.works) > 1:
            hook.record("step")
        return step(state, batch)

    run(watched_step, init_state(), make_batches, config=LoopConfig(steps=2, log_every=1), hooks=[hook])
    assert seen == {
        "step": ("compile", 3600.0),
        "call": ("sample", "max_phase"),
        "write": ("hook", "max_step"),
        "on_step": ("hook", "max_step"),
    }
