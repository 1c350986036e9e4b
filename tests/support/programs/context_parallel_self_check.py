"""Check that context parallelism is checked: no problem if it is right, and one if keys or tokens are another's.

The argument is the folder of the tiny run's clips.
"""

import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax

from dit_video.distributed import Parallelism, context_parallel, make_shardings
from dit_video.experiment import Experiment, ModelConfig, Run
from dit_video.experiment.self_check.context_checks import check_context_parallel
from dit_video.experiment.self_check.model_checks import perturb
from dit_video.models.autoencoders import IdentityConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.tokens import Grid, PackedShape
from dit_video.training.hooks.metric_logs import MonitoringConfig
from support import tiny

BACKBONE = DiTConfig(channels=3, context_width=16, patch=Grid(1, 2, 2), width=32, layers=3, heads=4)


def find_problems(clips: Path, attention: str, **sizes: int) -> list[str]:
    """Return the messages of the check of a training that has not begun."""
    experiment = Experiment(
        name="pixels",
        data=dataclasses.replace(tiny.EXPERIMENT.data, cache_latents=False),
        model=ModelConfig(
            autoencoder=IdentityConfig(),
            backbone=BACKBONE,
            text_encoder=tiny.EXPERIMENT.model.text_encoder,
            layout=PackedShape(tokens=1280, text=96, segments=3),
        ),
        stages=(dataclasses.replace(tiny.EXPERIMENT.denoiser, batch=4),),
        parallel=Parallelism(context_attention=attention, **sizes),
        monitoring=MonitoringConfig(self_check=True),
    )
    with tempfile.TemporaryDirectory() as folder:
        run, stage = Run.create(Path(folder) / "run", experiment), experiment.denoiser
        run.take(clips)
        run = stage.adapt_run(run)
        trainer, open_batches, loss, trained = stage._open_training(run, is_new=True)
        subject = stage._make_self_check(run, trainer, loss, trained, is_new=True)._subject
        with contextlib.closing(open_batches(0)) as batches:
            rows = next(iter(batches))
        shardings = make_shardings(jax.eval_shape(trainer.init, trainer.random_key), trainer.mesh)
        params = jax.jit(lambda key: perturb(trainer.init(key)), out_shardings=shardings)(trainer.random_key)
        return [problem.message for problem in check_context_parallel(subject, params, rows)]


def keep_at_home(self, arrays):
    """Send nothing: each rank sees its own keys again and again."""
    return arrays


def drop_tokens(real):
    """Return an exchange after which half of the tokens are zero."""

    def exchange(*args, **kwargs):
        result = real(*args, **kwargs)
        return result.at[:, : result.shape[1] // 2].set(0)

    return exchange


def main() -> None:
    """Check what is right and what is wrong."""
    clips = Path(sys.argv[1])
    for attention in ("ring", "ulysses"):
        for sizes in ({"data": 2, "context": 4}, {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}):
            assert find_problems(clips, attention, **sizes) == [], (attention, sizes)
    assert find_problems(clips, "ring", data=8) == []  # nothing to compare
    with mock.patch.object(context_parallel.RingAttention, "send_to_next", keep_at_home):
        (problem,) = find_problems(clips, "ring", data=2, context=4)
        assert "on 4 devices by ring" in problem, problem
    with mock.patch.object(jax.lax, "all_to_all", drop_tokens(jax.lax.all_to_all)):
        (problem,) = find_problems(clips, "ulysses", data=2, context=4)
        assert "on 4 devices by ulysses" in problem, problem
    print("done")


if __name__ == "__main__":
    main()
