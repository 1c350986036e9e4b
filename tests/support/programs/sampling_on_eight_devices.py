"""Sample on meshes of eight devices, and compare with one device; the arguments are names of the checks below."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dit_video
from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.diffusion import AdaptiveProjectedGuidance, Ddim, Guidance
from dit_video.distributed import Parallelism, make_mesh, make_partitioner
from dit_video.models.backbones.dit import DiTConfig
from dit_video.planning.steps import plan_step
from dit_video.sampling import sampler
from dit_video.sampling.pipeline import Pipeline, Request
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.program import make_program
from dit_video.tokens import Grid
from support.device_memory import count_bytes
from support.random_params import make_random_params
from support.recalling_model import RecallingConfig
from support.tiny import EXPERIMENT
from support.tiny_pipeline import make_params

TOLERANCE = 2e-5
"""Largest difference of latents of about unit size: sums of float32 in another order, over all steps."""
DIT = DiTConfig(channels=4, context_width=16, patch=Grid(1, 2, 2), width=32, layers=2, heads=4)
CONFIG = PipelineConfig(
    model=replace(EXPERIMENT.get_model(), backbone=DIT, fps=16.0),
    batch=2,
    sampling=EXPERIMENT.sampling,
    size=Grid(5, 16, 16),
)
PARAMS = make_params(CONFIG)
REQUESTS = [
    Request("a red circle", Grid(5, 16, 16), 1),
    Request("a square", Grid(9, 16, 32), 2),
    Request("larger than a row", Grid(9, 32, 32), 3, "blue"),
]
PARALLELISMS = (
    Parallelism(data=8),
    Parallelism(data=2, context=4),
    Parallelism(data=1, fsdp=2, tensor=2, context=2),
    Parallelism(data=2, context=4, context_attention="ring"),
)


def make_pipeline(config: PipelineConfig = CONFIG, parallel: Parallelism | None = None) -> Pipeline:
    """Return a pipeline with random weights."""
    return Pipeline(config, **PARAMS, parallel=parallel)


def assert_latents_are_equal(actual, expected) -> None:
    """Compare the latents of all requests."""
    for mine, theirs in zip(actual, expected, strict=True):
        assert np.std(theirs) > 0.1
        np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)


def latents() -> None:
    """Check that latents of any mesh are those of one device, and so are clips, up to rounding of a pixel."""
    one = make_pipeline()
    expected, clips = one.generate_latents(REQUESTS), one.generate_many(REQUESTS)
    for parallel in PARALLELISMS:
        several = make_pipeline(parallel=parallel)
        assert_latents_are_equal(several.generate_latents(REQUESTS), expected)
        for mine, theirs in zip(several.generate_many(REQUESTS * 2), clips * 2, strict=True):
            assert np.abs(mine.frames.astype(int) - theirs.frames).max() <= 1
    (trace,) = (several.trace(REQUESTS[0]) for several in [make_pipeline(parallel=PARALLELISMS[1])])
    np.testing.assert_allclose(trace.latents[-1], expected[0], atol=TOLERANCE)


def guidance() -> None:
    """Check branches that are evaluated apart, at some times, with momentum, or not at all, and a solver with noise."""
    momentum = Guidance(scales={"text": 3.0}, method=AdaptiveProjectedGuidance())
    samplings = [
        replace(CONFIG.sampling, branch_evaluation="apart"),
        replace(CONFIG.sampling, guidance=Guidance(scales={"text": 3.0}, interval=(0.4, 1.0))),
        replace(CONFIG.sampling, guidance=momentum, solver=Ddim(eta=1.0)),
        replace(CONFIG.sampling, guidance=1.0),
    ]
    for sampling in samplings:
        config = replace(CONFIG, sampling=sampling)
        expected = make_pipeline(config).generate_latents(REQUESTS)
        assert_latents_are_equal(make_pipeline(config, PARALLELISMS[1]).generate_latents(REQUESTS), expected)


def wan() -> None:
    """Check a folder of open weights with two experts and frozen texts, which is read to a mesh."""
    from support.tiny_wan import SIZE, TWO, write_wan

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "wan"
        write_wan(folder, **TWO)
        requests = [Request("a cat", SIZE, 1), Request("a dog on a sofa", (5, 32, 16), 2)]
        one = dit_video.load(folder, dtype="float32")
        sampling = one.make_sampling(steps=4)
        expected = one.generate_latents(requests, sampling=sampling)
        parallel = Parallelism(data=2, fsdp=2, context=2)
        several = dit_video.load(folder, dtype="float32", parallel=parallel)
        assert all(leaf.sharding.mesh == make_mesh(parallel) for leaf in jax.tree.leaves(several.denoiser_params))
        assert_latents_are_equal(several.generate_latents(requests, sampling=sampling), expected)


def weights() -> None:
    """Check that weights are put on the devices once, and that each device holds its share."""
    calls = record_calls()
    parallel, device = Parallelism(data=1, fsdp=8), jax.devices()[-1]
    before = count_bytes()[device]
    wide = DiTConfig(channels=4, context_width=16, patch=Grid(1, 2, 2), width=128, layers=2, heads=4)
    denoiser = {"backbone": make_random_params(wide.make), "text": PARAMS["denoiser"]["text"]}
    config = CONFIG.replace_model(backbone=wide)
    several = Pipeline(config, autoencoder=PARAMS["autoencoder"], denoiser=denoiser)
    big = several.denoiser_params
    with tempfile.TemporaryDirectory() as temporary:
        several.save(Path(temporary) / "pipeline")
        loaded = dit_video.load(Path(temporary) / "pipeline", parallel=parallel)
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(big))
        assert count_bytes()[device] - before < 0.25 * total, (count_bytes()[device] - before, total)
        assert_latents_are_equal(loaded.generate_latents(REQUESTS), several.generate_latents(REQUESTS))
        loaded.save(Path(temporary) / "again")
        files = [Path(temporary) / name / "denoiser.safetensors" for name in ("pipeline", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()
    calls.clear()
    for pipeline in (loaded, loaded, make_pipeline()):
        pipeline.generate_latents(REQUESTS)
    first, second, own = (flatten(arguments[0]) for _, arguments in calls)
    assert all(leaf is second[path] for path, leaf in first.items())
    assert all(isinstance(leaf, jax.Array) for leaf in own.values())


class RecordedCallError(Exception):
    """A sampling program was called, and was not to run."""


def record_calls(*, runs: bool = True) -> list:
    """Return a list, to which each sampling program is added that is called from now on, with its arguments.

    Programs that are not to run raise `RecordedCallError` instead.
    """
    calls = []

    def make_recording_program(*kinds):
        program = make_program(*kinds)

        def run(*arguments):
            calls.append((program, arguments))
            if not runs:
                raise RecordedCallError
            return program(*arguments)

        return run

    sampler.make_program = make_recording_program
    return calls


def plan(backbone: DiTConfig = DIT) -> None:
    """Check that the program of a plan is that which is called, with arguments of the same shapes and shardings."""
    calls = record_calls(runs=False)
    config = CONFIG.replace_model(backbone=backbone)
    for parallel in PARALLELISMS:
        experiment = replace(EXPERIMENT.replace_model(backbone=backbone), parallel=parallel)
        planned = plan_step(experiment, "sampler", make_partitioner(parallel), clips=[12])
        # Each fills a row, so that its branches are in rows of their own, as in the plan.
        requests = [Request("a", Grid(9, 16, 64), seed) for seed in range(planned.arguments[2].keys.shape[0])]
        calls.clear()
        with pytest.raises(RecordedCallError):
            make_pipeline(config, parallel).generate_latents(requests)
        ((program, arguments),) = calls
        assert program is planned.step
        expected, actual = (flatten(tuple(each)) for each in (planned.arguments, arguments))
        assert expected.keys() == actual.keys(), expected.keys() ^ actual.keys()
        for path, leaf in expected.items():
            assert (leaf.shape, leaf.dtype) == (actual[path].shape, actual[path].dtype), path
            assert leaf.sharding.is_equivalent_to(actual[path].sharding, leaf.ndim), path


def state() -> None:
    """Check that a model's state is shared as the rows are, and planned, and that latents are those of one device."""
    backbone = RecallingConfig(**vars(DIT))
    config = CONFIG.replace_model(backbone=backbone)
    calls = record_calls()
    guidances = (Guidance(scales={"text": 3.0}), Guidance(scales={"text": 3.0}, interval=(0.4, 0.9)))
    for guidance in guidances:
        own = replace(config, sampling=replace(config.sampling, guidance=guidance))
        expected = make_pipeline(own).generate_latents(REQUESTS)
        for parallel in PARALLELISMS[:2]:
            calls.clear()
            assert_latents_are_equal(make_pipeline(own, parallel).generate_latents(REQUESTS), expected)
            mesh = make_mesh(parallel)
            for _, (_, sampling_state, *_) in calls:
                last = sampling_state.denoiser.branches["last"]
                assert last.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), "context")), 3), last
                assert sampling_state.denoiser.branches["calls"].addressable_shards[0].data.shape[0] < len(last)
    plan(backbone)


def mistakes() -> None:
    """Check that sizes that do not fit the devices or the heads are refused with a fix."""
    for parallel, parts in (
        (Parallelism(data=3), ("data=3 does not divide", "Use data=1 or 2 or 4 or 8")),
        (Parallelism(data=1, tensor=8), ("4 heads", "tensor=8", "Use a mesh with tensor of 1, 2, 4")),
        (Parallelism(data=1, context=8), ("context=8 is invalid", "Use context=1 or 2 or 4", "ring")),
    ):
        with pytest.raises(UserError) as caught:
            make_pipeline(parallel=parallel)
        assert all(part in str(caught.value) for part in parts), caught.value


def main() -> None:
    """Run the checks."""
    assert jax.device_count() == 8
    for name in sys.argv[1:]:
        globals()[name]()
        print(name, flush=True)
    print("done")


if __name__ == "__main__":
    main()
