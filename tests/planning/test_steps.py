"""Plans describe what is trained: the compiled step of a plan is that of a run."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dit_video.core.platform.devices import Platform
from dit_video.distributed import Parallelism, make_abstract_partitioner, make_mesh
from dit_video.experiment import Experiment, ModelConfig, Run
from dit_video.experiment.initial_weights import ParameterPlacer, load_initial_denoiser
from dit_video.experiment.recipes.finetune import FineTuningOptions, make_finetuning_experiment
from dit_video.models.autoencoders import IdentityConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.planning import Topology
from dit_video.planning.plan import plan_experiment
from dit_video.planning.planned_program import read_lowered
from dit_video.planning.steps import plan_step
from dit_video.tokens import Grid, PackedShape
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from dit_video.training.program_report import describe_program
from support.devices import HANG, PROGRAMS
from support.tiny_wan import write_wan

ROOT = Path(__file__).resolve().parents[2]
BACKBONE = DiTConfig(
    channels=3, context_width=16, patch=Grid(1, 2, 2), width=128, layers=2, heads=2, dtype="bfloat16", remat="full"
)


@pytest.fixture
def run_in_pixels(tiny, tiny_clips, tmp_path) -> Path:
    """Return the folder of a run whose rows are long enough for a kernel, and that has not begun to train."""
    denoiser = dataclasses.replace(tiny.EXPERIMENT.denoiser, batch=4, optimizer=AdamW(schedule=Constant(warmup=2)))
    experiment = Experiment(
        name="pixels",
        data=dataclasses.replace(tiny.EXPERIMENT.data, cache_latents=False),
        model=ModelConfig(
            autoencoder=IdentityConfig(),
            backbone=BACKBONE,
            text_encoder=tiny.EXPERIMENT.model.text_encoder,
            layout=PackedShape(tokens=2048, text=96, segments=3),
        ),
        stages=(denoiser,),
        parallel=Parallelism(data=1, fsdp=2, context=2),
    )
    Run.create(tmp_path / "run", experiment).take(tiny_clips)
    return tmp_path / "run"


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.slow
@pytest.mark.parametrize("topology", [pytest.param("v5p:2x2x1", marks=pytest.mark.nightly), "v6e:2x2"])
def test_a_run_s_own_step_has_the_kernels_and_operations_of_its_plan(run_in_pixels, topology):
    """This takes a process of its own: one that has libtpu would look for TPUs from then on."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -e '.[tpu]'")
    command = [sys.executable, "-P", str(PROGRAMS / "run_step_for_tpu.py"), str(run_in_pixels), topology]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["run"] == result["plan"]
    assert result["attention"] == "splash"
    assert result["compiled"] == result["planned"]
    # Forward pass, its recomputation, and the gradients of queries and of keys and values, in both layers.
    assert sum(result["compiled"]["attention"]["self, Full: splash"].values()) >= 2 * 4
    assert {axis for part in result["compiled"]["moved"] for axis in part["axes"]} >= {"fsdp", "context"}
    assert result["compiled"]["warnings"] == []
    assert result["run"]["kernels"] > 0
    assert result["run"]["operations"]["dot_general"] > 0


def test_a_run_s_own_step_has_the_kernels_and_dtypes_of_its_plan_for_a_gpu(run_in_pixels, monkeypatch):
    topology = Topology.parse("h200:1")
    monkeypatch.setattr(Platform, "from_device", lambda device: topology.chip.platform)
    run = Run.open(run_in_pixels)
    experiment = dataclasses.replace(run.experiment, parallel=Parallelism())
    run = dataclasses.replace(run, experiment=experiment, devices=tuple(jax.devices()[:1]))
    trainer, open_batches = experiment.denoiser.open_training(run, is_new=False)
    with contextlib.closing(open_batches(0)) as batches:
        program = read_lowered(*trainer.get_program(next(iter(batches))))
    planned = plan_experiment(experiment, topology).program
    own = describe_program(program, {}, "gpu", topology.chip, flags=planned.flags, is_compiled=False)
    assert own == planned
    # Both layers compute their attention again in the backward pass.
    assert own.attention["self, Full: cudnn"] == {"__cudnn$fmhaSoftmax": 4, "__cudnn$fmhaSoftmaxBackward": 2}
    assert own.products["bf16"] > 0.9
    assert own.recomputed > 0.1
    assert own.warnings == ()


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_weights_of_a_plan_have_the_dtypes_of_a_run(tmp_path, train):
    """Kernels that adapters change are kept in bfloat16: half of the memory of a training of adapters."""
    write_wan(tmp_path / "wan")
    experiment = make_finetuning_experiment(tmp_path / "wan", FineTuningOptions(train=train))
    model, training = experiment.get_model(), experiment.denoiser
    partitioner = make_abstract_partitioner(Parallelism(), 1)
    planned = plan_step(experiment, "denoiser", partitioner, clips=[8])
    kept = planned.arguments[2][0] if train == "lora" else planned.arguments[0].params
    placer = ParameterPlacer(make_mesh(Parallelism(), jax.devices()[:1]), training, model.backbone)
    loaded = load_initial_denoiser(model, str(tmp_path / "wan"), placer, jax.random.key(0))
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, (kept, loaded))
    assert dtypes[0] == dtypes[1]
    assert (jnp.bfloat16 in jax.tree.leaves(dtypes[0])) == (train == "lora")
