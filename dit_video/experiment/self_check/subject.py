"""The training that is checked, and the problems that checks find."""

import functools
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jax.sharding import NamedSharding, PartitionSpec

from dit_video.core import rng
from dit_video.data.clips import ClipSource
from dit_video.data.latents.cache import LatentSource
from dit_video.data.latents.plan import Encoding
from dit_video.experiment.denoiser import TrainableDenoiser
from dit_video.experiment.run import Run
from dit_video.experiment.training_config import DenoiserTraining, TemporalWeights
from dit_video.models.encoders import Tokenizer
from dit_video.models.model_config import ModelConfig
from dit_video.training.losses.denoiser import TEMPORAL_PATHS, DenoiserLoss, attach_factors
from dit_video.training.trainer import Trainer
from dit_video.weights.frozen_encoders import FrozenTextEncoder

FILE = "self_check.jsonl"
"""Name of the log in the folder of a training."""
MAX_MESSAGES = 3
"""Number of problems of one check that are printed; all are logged."""


class Problem(NamedTuple):
    """A difference between a training and what it should be."""

    check: str
    """Name of the check, such as "latents"."""
    message: str
    """Description of the difference, and of where to look for its cause."""


class ProblemLog:
    """The log of a training's problems, `{"step": …, "check": …, "message": …}` on each line.

    The file exists, and may be empty, once the first checks are over.
    """

    def __init__(self, path: Path, *, process: int = 0):
        self._path, self._process = path, process
        self._counts = Counter[str]()
        self._is_made = False
        """Whether the file exists; without problems it is not opened again, as steps are short."""

    def add(self, step: int, problems: list[Problem], *, is_local: bool = False) -> None:
        """Log problems at a step, and print the first ones of each check.

        Args:
          step: Number of steps done.
          problems: The problems.
          is_local: Whether they are of this process alone, such as of its rows. Other processes than the first, which
            writes the log, print these, and leave those that all have to the first.
        """
        for problem in problems if is_local or self._process == 0 else []:
            self._counts[problem.check] += 1
            if self._counts[problem.check] <= MAX_MESSAGES:
                where = f", process {self._process}" if self._process else ""
                print(
                    f"self-check, step {step}{where}: {problem.check}: {problem.message}", file=sys.stderr, flush=True
                )
        if self._process == 0 and (problems or not self._is_made):
            self._is_made = True
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.writelines(json.dumps({"step": step, **problem._asdict()}) + "\n" for problem in problems)


@dataclass(frozen=True, kw_only=True)
class CheckedTraining:
    """The training of a denoiser, and all that its batches and steps are made of."""

    run: Run
    """The run, as the stage of the training sees it."""
    training: DenoiserTraining
    trainer: Trainer
    loss: DenoiserLoss
    trained: TrainableDenoiser
    text_encoder: Tokenizer | FrozenTextEncoder
    latents: LatentSource | None = None
    """Cached latents; None where clips are encoded as they are read."""
    encoding: Encoding | None = None
    """Encoding that made the latents."""

    @property
    def model(self) -> ModelConfig:
        """Return the model, as this training has it."""
        return self.run.model

    @property
    def clips(self) -> ClipSource:
        """Return the training clips."""
        return self.run.training_clips

    @property
    def frozen_params(self) -> tuple[dict[str, Any], ...]:
        """Return the last arguments of the step: weights that are read and not trained."""
        frozen = self.trained.frozen_params
        return () if frozen is None else (frozen,)

    def merge_params(self, params: dict[str, Any], frozen: tuple[dict[str, Any], ...]) -> dict[str, Any]:
        """Return the parameters of the model from the trained and the frozen ones. Traceable."""
        lora = self.trained.lora
        return params if lora is None else attach_factors(frozen[0], params, lora.scale)

    def is_trained(self, path: str) -> bool:
        """Return whether the config has this parameter trained."""
        if self.trained.lora is not None:
            return True
        if isinstance(self.training.train, TemporalWeights) and not re.search(TEMPORAL_PATHS, path):
            return False
        return self.training.optimizer.is_trained(path)

    def make_generator(self, check: str) -> np.random.Generator:
        """Return the random numbers of a check, the same in all processes."""
        return rng.make_generator(self.run.seed, f"self-check: {check}")

    @functools.cached_property
    def replicated(self) -> NamedSharding:
        """Return the sharding of results that every process reads."""
        return NamedSharding(self.trainer.mesh, PartitionSpec())

    @functools.cached_property
    def clip_names(self) -> pa.Array:
        """Return the names of the training clips."""
        return pa.array(self.clips.column("name"), pa.string())

    def find_clip(self, example: int) -> int:
        """Return the number of the training clip that an example was made of."""
        return example if self.latents is None else pc.index(self.clip_names, self.latents.clips[example]).as_py()

    def jit(self, function: Any, out_shardings: Any = None) -> Any:
        """Return a jitted function that is compiled quickly, as it is called a few times; all processes read results.

        Args:
          function: Traceable function.
          out_shardings: Shardings of the results; None for results on every device.
        """
        shardings = self.replicated if out_shardings is None else out_shardings
        return jax.jit(function, out_shardings=shardings, compiler_options={"exec_time_optimization_effort": -1.0})


def iterate_within(seconds: float, items: Any, *, minimum: int) -> Iterator[Any]:
    """Yield items until the time is over, but at least a minimum number."""
    end = time.monotonic() + seconds
    for number, item in enumerate(items):
        if number >= minimum and time.monotonic() > end:
            return
        yield item
