"""TFDS data sets in ArrayRecord files, written and read without TensorFlow.

`tfds.core.ShardBasedBuilder` writes examples as they come, in their order. (`GeneratorBasedBuilder` collects all of
them first, and past 1 GB it moves them to files through TensorFlow, which isn't installed.)
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from dit_video.errors import MissingError, UserError

SPLIT = "train"
MAX_BYTES = (1 << 31) - (1 << 20)
"""An example is one protocol buffer, which holds less than 2 GiB."""

Shard = Callable[[], Iterator[Mapping[str, Any]]]
"""The examples of one file. It is called once, after the shards before it are used up."""


def content() -> tfds.features.Tensor:
    """The feature of raw bytes."""
    return tfds.features.Tensor(shape=(), dtype=np.object_)


# TFDS has no types, and mypy then takes class keywords for those of `object`.
class _Records(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes given shards. Its name, which the files carry, is that of the subclass."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar[dict] = {}
    """Nothing is downloaded. (TFDS would look for a list of checksums by a package that it does not depend on.)"""

    def __init__(self, *, features: Mapping[str, Any], shards: Sequence[Shard], **kwargs):
        self._given_features = features
        self._shards = shards
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(dict(self._given_features))
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _shard_iterators_per_split(self, dl_manager):
        return {SPLIT: [_numbered(shard) for shard in self._shards]}

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded: no message."""

    def _log_download_done(self) -> None:
        """As above."""


class Clips(_Records, skip_registration=True):  # type: ignore[call-arg]  # as above
    """Encoded clips."""


class Latents(_Records, skip_registration=True):  # type: ignore[call-arg]  # as above
    """What an autoencoder made of clips."""


def _numbered(shard: Shard) -> Callable[[], Iterator[tuple[int, Mapping[str, Any]]]]:
    return lambda: enumerate(shard())


def write_records(
    folder: Path, builder: type[Clips] | type[Latents], *, features: Mapping[str, Any], shards: Sequence[Shard]
) -> None:
    """Write a data set of one split into `folder`, which must not exist yet.

    `tfds.builder_from_directory(folder).as_data_source("train")` reads it back in order.
    """
    work = folder.with_name(folder.name + ".tfds")
    try:
        made = builder(features=features, shards=shards, data_dir=work, file_format="array_record")
        made.download_and_prepare()
        Path(made.data_dir).rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def open_records(folder: Path) -> Sequence[dict[str, Any]]:
    """Random access to the examples of a data set.

    Raises:
      MissingError: no such folder.
      UserError: the folder holds no data set, or one whose files are damaged.
    """
    if not folder.is_dir():
        raise MissingError(f"no such data set: {folder}")
    try:
        return tfds.builder_from_directory(folder).as_data_source(SPLIT)
    except Exception as error:  # TFDS raises many types, depending on which file is missing or damaged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{folder} is not a readable TFDS data set in ArrayRecord files ({reason}); make it again"
        ) from error
