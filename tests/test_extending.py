"""Extensions without an edit of the package: one file of another package, and one line that registers it."""

import dataclasses
import importlib
import sys

import numpy as np
import pytest

import dit_video
from dit_video.core import config_json, registry
from dit_video.core.errors import UserError
from dit_video.experiment import PretrainedAutoencoder
from dit_video.experiment.run import Run

pytestmark = pytest.mark.slow

SAMPLER = '''
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from dit_video.core.registry import register
from dit_video.diffusion import Solver


class AdamsState(NamedTuple):
    x: Any
    slope: Any
    length: Any


@register
@dataclass(frozen=True, kw_only=True)
class Adams(Solver):
    """Adams and Bashforth's second order in flow coordinates."""

    share: float = 0.5

    def init(self, noisy, *, steps):
        return AdamsState(noisy, jnp.zeros_like(noisy), jnp.zeros(()))

    def step(self, estimate, process, state, interval):
        start, end = map(process.flow_coordinates, (interval.time, interval.next_time))
        length = end.integration_time - start.integration_time
        slope = process.flow_slope(estimate(state.x, interval.time))
        is_first = state.length == 0
        weight = jnp.where(is_first, 0.0, self.share * length / jnp.where(is_first, 1.0, state.length))
        x = state.x / start.scale + length * ((1 + weight) * slope - weight * state.slope)
        return AdamsState(end.scale * x, slope, length)
'''
POSITIONS = '''
from dataclasses import dataclass

import jax.numpy as jnp

from dit_video.backbones.dit import PositionEmbedding
from dit_video.core.registry import register
from dit_video.nn import Linear


@register
@dataclass(frozen=True, kw_only=True)
class Triangles(PositionEmbedding):
    """Triangle waves of the positions, then a linear layer."""

    periods: tuple[float, ...] = (2.0, 5.0)

    @property
    def linear_features(self):
        return 3 * len(self.periods)

    def make(self, width, *, dtype, rngs):
        return Linear(self.linear_features, width, dtype=dtype, rngs=rngs)

    def compute_features(self, positions, segments, *, count, width):
        phases = positions[..., None] / jnp.asarray(self.periods) % 1
        return jnp.abs(2 * phases - 1).reshape(*positions.shape[:-1], -1)
'''


@pytest.fixture
def add_package(tmp_path, monkeypatch):
    """Return a function that writes a module of another package and imports it."""
    monkeypatch.setattr(registry, "_CLASSES", {})
    monkeypatch.syspath_prepend(tmp_path)
    imported = []

    def add(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        imported.append(name)
        return importlib.import_module(name)

    yield add
    for name in imported:
        sys.modules.pop(name, None)


def train(experiment, tiny_run, folder):
    """Train two steps of the denoiser on the tiny run's clips and autoencoder, and return the loaded pipeline."""
    model = experiment.autoencoder.model
    pretrained = PretrainedAutoencoder(model=model, folder=str(tiny_run / "pipeline"))
    optimizer = dataclasses.replace(experiment.denoiser.optimizer, warmup=0)
    denoiser = dataclasses.replace(experiment.denoiser, steps=2, optimizer=optimizer)
    experiment = dataclasses.replace(experiment, autoencoder=pretrained, denoiser=denoiser)
    Run.create(folder, experiment).train((tiny_run / "data").resolve())
    return dit_video.load(folder)


@pytest.mark.usefixtures("quick_compilation")
def test_a_sampler(add_package, tiny, tiny_run, tiny_pipeline, tmp_path):
    solver = add_package("their_sampler", SAMPLER).Adams()
    arguments = {"size": (9, 16, 32), "seed": 1, "output": "latents"}
    result = tiny_pipeline.generate("a red circle", steps=16, sampler=solver, **arguments)
    expected = tiny_pipeline.generate("a red circle", steps=64, sampler="heun", **arguments)
    assert np.abs(result - expected).mean() < 1e-3 * np.abs(expected).mean()
    sampling = dataclasses.replace(tiny.EXPERIMENT.sampling, solver=solver, steps=2)
    pipeline = train(dataclasses.replace(tiny.EXPERIMENT, sampling=sampling), tiny_run, tmp_path / "run")
    assert pipeline.config.sampling.solver == solver
    assert np.isfinite(pipeline.generate("a red circle", output="latents")).all()


@pytest.mark.usefixtures("quick_compilation")
def test_a_position_embedding(add_package, tiny, tiny_run, tmp_path):
    position = add_package("their_positions", POSITIONS).Triangles()
    dit = dataclasses.replace(tiny.EXPERIMENT.denoiser.dit, absolute_position=position)
    denoiser = dataclasses.replace(tiny.EXPERIMENT.denoiser, dit=dit)
    pipeline = train(dataclasses.replace(tiny.EXPERIMENT, denoiser=denoiser), tiny_run, tmp_path / "run")
    assert pipeline.config.dit.absolute_position == position
    assert np.isfinite(pipeline.generate("a red circle", steps=2, output="latents")).all()


def test_a_config_names_registered_classes_only(add_package, tmp_path, monkeypatch):
    solver = add_package("their_sampler", SAMPLER).Adams(share=0.4)
    written = config_json.to_json(solver)
    assert config_json.from_json(written) == solver
    monkeypatch.setattr(registry, "_CLASSES", {})
    with pytest.raises(UserError, match=r"'their_sampler:Adams' lies outside dit_video and is not registered"):
        config_json.from_json(written)
    with pytest.raises(TypeError, match=r"register it: dit_video\.core\.registry\.register"):
        config_json.to_json(solver)


def test_an_installed_package_registers_by_its_entry_point(add_package, tmp_path, monkeypatch):
    written = config_json.to_json(add_package("their_sampler", SAMPLER).Adams())
    monkeypatch.setattr(registry, "_CLASSES", {})
    sys.modules.pop("their_sampler")
    registry.load_entry_points.cache_clear()
    installed = tmp_path / "their_package-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[dit_video]\nsamplers = their_sampler\n")
    assert type(config_json.from_json(written)).__name__ == "Adams"
    registry.load_entry_points.cache_clear()
