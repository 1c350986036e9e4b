from dit_video.distributed.progress import PROGRESS
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.hook import PeriodicCall
from dit_video.training.loop import LoopConfig, run
from support.loop_training import init_state, make_batches, step


def test_a_training_declares_all_but_its_steps_as_phases(monkeypatch, tmp_path):
    """A watch for hangs knows the steps of a training, and what it does besides."""
    seen = []

    def record(event):
        seen.append((event, *[phase.name for phase in PROGRESS.phases]))

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
    count = PROGRESS.step_count
    run(
        watched_step,
        init_state(),
        make_batches,
        config=LoopConfig(steps=4, save_every=2),
        checkpoints=Checkpoints(tmp_path),
        hooks=[PeriodicCall(every=2, function=sample, name="sample")],
    )
    assert PROGRESS.step_count == count + 4
    assert not PROGRESS.num_loops
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
