"""Initial weights of a denoiser: checks before they are read, their placement on devices, and their identity."""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.core.trees import flatten
from dit_video.distributed import make_shardings
from dit_video.experiment.training_config import DenoiserTraining, LoraAdapters, Student, TemporalWeights
from dit_video.families import find_family, find_format, load_denoiser, read_denoiser_config
from dit_video.models.backbones.conversion import grow, grow_config
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.model_config import ModelConfig
from dit_video.nn import get_param_shapes
from dit_video.sampling.loading import read_denoiser
from dit_video.sampling.pipeline_config import DENOISER, is_pipeline_folder, read_pipeline_config
from dit_video.training.losses.denoiser import TEMPORAL_PATHS
from dit_video.weights import load_metadata
from dit_video.weights.kernels import get_kernel_classes
from dit_video.weights.parameter import Parameter
from dit_video.weights.tensor_map import make_dtype_fn

_TRAINING_ONLY_FIELDS = (
    *("bfloat16", "std", "attention", "dtype", "remat", "folder", "identity"),
    *("position_scale", "position_stretch"),
)
"""Fields of configs that weights do not depend on, so that their files do not hold them."""


def check_initial_weights(training: DenoiserTraining, model: ModelConfig, *, is_resuming: bool = False) -> None:
    """Check the initial weights of a model and its trained parameters, without reading weights.

    Args:
      training: The training.
      model: The model, as this training has it.
      is_resuming: True if the training has begun; then the folder need not be there any more, unless its weights are
        not trained.

    Raises:
      MissingError: If the folder of the initial weights does not exist.
      UserError: If the folder has weights of a model that cannot grow to this one, or kernels that are not arrays, or
        if there are no temporal layers where only these are trained.
    """
    if isinstance(training.train, TemporalWeights) and not has_temporal_layers(model.backbone):
        rule = "the denoiser has no temporal layers. Use AllWeights or LoraAdapters."
        raise UserError(f"train=TemporalWeights is invalid: {rule}")
    start, is_adapted = training.train.init_from, isinstance(training.train, LoraAdapters | Student)
    if start is not None and (folder := _find_transformer(start)):
        family = find_family(Path(start))
        own_config = read_denoiser_config(folder) if family is None else family.read_denoiser_config(Path(start))
        _check_growth(folder, "the transformer", own_config, model.backbone, is_adapted=is_adapted)
        if training.expert is not None:
            other = training.expert.other_folder
            _check_same(other, "the transformer", read_denoiser_config(other), model.backbone)
        if get_param_shapes(model.text_encoder.make):
            fix = "set text_encoder=FrozenTextConfig(...), or ClassNamesConfig(...) for a model of classes"
            raise UserError(f"{start} has no text encoder to train; {fix}")
    elif start is not None and (is_adapted or not is_resuming):
        own = read_pipeline_config(_find_pipeline(start)).model
        _check_growth(start, "backbone", own.backbone, model.backbone, is_adapted=is_adapted)
        _check_same(start, "text_encoder", own.text_encoder, model.text_encoder)
        for path, name in get_kernel_classes(load_metadata(_find_pipeline(start) / DENOISER)).items():
            rule = f"{path} is a {name}, not an array, so that it cannot be trained, nor adapters be merged into it"
            raise UserError(f"init_from={start} is invalid: {rule}. Use the weights that it was made of")
    denoiser_format = find_format(model.backbone)
    targets = () if training.lora is None else training.lora.targets
    for path in () if denoiser_format is None else denoiser_format.unadapted:
        if any(re.search(pattern, path) for pattern in targets):
            fix = "use targets that exclude it, such as blocks/.*kernel$"
            raise UserError(f"adapters of {path} can't be written in other programs' formats; {fix}")


def has_temporal_layers(backbone: BackboneConfig) -> bool:
    """Return whether a backbone has parameters that `TemporalWeights` trains."""
    return any(re.search(TEMPORAL_PATHS, path) for path in flatten(get_param_shapes(backbone.make)))


def load_initial_denoiser(model: ModelConfig, start: str, placer: "ParameterPlacer", key: Array) -> dict[str, Any]:
    """Load the initial parameters from the folder `start`, each to its devices as soon as it is read.

    `key` is for the parameters that the folder's model lacks, and that it grows; see `check_initial_weights`.
    """
    backbone, params = read_initial_denoiser(start, placer)
    if grow_config(backbone, model.backbone) == backbone:
        return params
    return params | {"backbone": grow(backbone, params["backbone"], model.backbone, key)}


def read_initial_denoiser(start: str, placer: "ParameterPlacer") -> tuple[BackboneConfig, dict[str, Any]]:
    """Return the config and the parameters of the model in the folder `start`, each as `placer` returns it."""
    if transformer := _find_transformer(start):
        backbone, params = load_denoiser(
            transformer, kernel_dtype=placer.kernel_dtype, place=lambda path, each: placer(f"backbone/{path}", each)
        )
        return backbone, {"backbone": params, "text": {}}
    config = read_pipeline_config(_find_pipeline(start))
    return config.model.backbone, read_denoiser(_find_pipeline(start), config, placer)


def _check_growth(
    folder: str | Path, part: str, config: BackboneConfig, target: BackboneConfig, *, is_adapted: bool
) -> None:
    """Check that a folder's model is the config's, or can grow to it if all its weights are trained."""
    try:
        grown = config if is_adapted else grow_config(config, target)
    except UserError as error:
        raise UserError(f"init_from={folder} is invalid: {error}") from error
    _check_same(folder, part, grown, target)


def _check_same(folder: str | Path, part: str, actual: Any, expected: Any) -> None:
    if difference := describe_difference(actual, expected):
        raise UserError(f"{folder} holds another denoiser than the config's, in {part}: {difference}")


def _find_pipeline(start: str) -> Path:
    """Return the folder of a pipeline, or of a run's pipeline."""
    return Path(start) if is_pipeline_folder(start) else Path(start) / "pipeline"


def _find_transformer(start: str) -> Path | None:
    """Return the folder, or its authors' file, of the transformer of open weights; None in other folders."""
    folder = Path(start)
    if (family := find_family(folder)) is not None:
        return family.find_denoiser(folder, "backbone")
    return folder if (folder / "config.json").is_file() else None


def get_kernel_dtype(training: DenoiserTraining, backbone: BackboneConfig) -> np.dtype:
    """Return the dtype that the kernels of linear maps are read in.

    Where only adapters are trained, kernels are kept in the dtype of the matrix products: half the memory in bfloat16.
    """
    return jnp.dtype("float32" if training.lora is None else backbone.dtype)


def make_initial_dtype_fn(training: DenoiserTraining, backbone: BackboneConfig) -> Callable[[str], np.dtype]:
    """Return the function from the path of a parameter to the dtype that it is read in."""
    denoiser_format = find_format(backbone)
    float32_kernels = () if denoiser_format is None else denoiser_format.float32_kernels
    return make_dtype_fn(
        np.dtype(np.float32),
        get_kernel_dtype(training, backbone),
        float32_kernels=[f"backbone/{path}" for path in float32_kernels],
    )


class ParameterPlacer:
    """Placement of parameters on a mesh, which records a digest of each."""

    def __init__(self, mesh: Mesh, training: DenoiserTraining, backbone: BackboneConfig):
        self._mesh, self._digests = mesh, dict[str, str]()
        self.kernel_dtype = get_kernel_dtype(training, backbone)
        self._get_dtype = make_initial_dtype_fn(training, backbone)

    def __call__(self, path: str, parameter: Parameter) -> Array:
        target_dtype = self._get_dtype(path)
        digest = hashlib.sha256()

        def hashed_pieces() -> Iterator[np.ndarray]:
            for piece in parameter.read_chunks():
                leaf = np.ascontiguousarray(piece.astype(target_dtype, copy=False))
                digest.update(leaf.reshape(-1).view(np.uint8).data)
                yield leaf

        sharding = make_shardings({path: parameter}, self._mesh)[path]
        array = Parameter(parameter.shape, target_dtype, hashed_pieces).to_device(sharding)
        self._digests[path] = digest.hexdigest()
        return array

    @functools.cached_property
    def identity(self) -> str:
        """Return the identity of all parameters that were placed."""
        return hashlib.sha256(repr(sorted(self._digests.items())).encode()).hexdigest()[:16]


def record_identity(path: Path, identity: str, start: str) -> None:
    """Record the identity of the initial weights; raise if it differs from the recorded one."""
    if path.is_file() and (before := read_json(path).get("identity")) != identity:
        raise UserError(f"{start} has other weights ({identity}) than before ({before}); put them back")
    if jax.process_index() == 0 and not path.is_file():
        write_json(path, {"start": start, "identity": identity})


def describe_difference(actual: Any, expected: Any) -> str:
    """Describe where two models' configs differ in more than their training; empty if they do not."""
    configs = (_drop_training_fields(config_json.to_json(config)) for config in (actual, expected))
    return config_json.describe_difference(*configs)


def _drop_training_fields(config: Any) -> Any:
    """Return a config as JSON, without fields that only training uses."""
    if not isinstance(config, dict):
        return config
    return {name: _drop_training_fields(value) for name, value in config.items() if name not in _TRAINING_ONLY_FIELDS}
