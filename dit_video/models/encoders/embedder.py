"""Embedding of texts by a frozen encoder, in batches of a few shapes, each text computed once."""

import hashlib
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32, Int32

from dit_video.core.errors import UserError
from dit_video.core.files import atomic_path
from dit_video.core.offload import move_to_devices
from dit_video.models.encoders.tokenizer import PretrainedTokenizer
from dit_video.nn import get_graph_def


class MemoryCache:
    """A cache of the most recently used embeddings, up to a number of bytes. Threads may share it."""

    def __init__(self, max_bytes: int):
        """Create a cache of up to `max_bytes`; an embedding that alone is larger is not kept."""
        self._max_bytes, self._used_bytes = max_bytes, 0
        self._values: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, text: str) -> Float32[np.ndarray, "s e"] | None:
        """Return the embedding, or None."""
        with self._lock:
            value = self._values.get(text)
            if value is not None:
                self._values.move_to_end(text)
            return value

    def put(self, text: str, value: Float32[np.ndarray, "s e"]) -> None:
        """Store an embedding, and drop the least recently used ones over the limit."""
        if value.nbytes > self._max_bytes:
            return
        with self._lock:
            if (previous := self._values.pop(text, None)) is not None:
                self._used_bytes -= previous.nbytes
            self._values[text] = value
            self._used_bytes += value.nbytes
            while self._used_bytes > self._max_bytes:
                self._used_bytes -= self._values.popitem(last=False)[1].nbytes


class FolderCache:
    """A cache with one `.npy` file per text, named by the text's hash, in one folder per encoder.

    Processes may share a folder: files are written atomically, and two processes write the same content to a file.
    """

    def __init__(self, folder: str | os.PathLike, *, identity: str, width: int):
        self._folder, self._width = Path(folder) / identity, width

    def get_path(self, text: str) -> Path:
        """Return the file of a text. There are 256 folders, as some file systems are slow with millions of files."""
        name = hashlib.sha256(text.encode()).hexdigest()
        return self._folder / name[:2] / f"{name}.npy"

    def get(self, text: str) -> Float32[np.ndarray, "s e"] | None:
        """Return the embedding, or None; a damaged file gives a warning and counts as absent."""
        path = self.get_path(text)
        try:
            value = np.load(path, allow_pickle=False)
            if value.dtype != np.float32 or value.ndim != 2 or value.shape[1] != self._width:
                raise ValueError(f"{value.dtype} {list(value.shape)} instead of float32 [s, {self._width}]")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, EOFError) as error:
            warnings.warn(f"can't read {path} ({error}); the text is embedded again", stacklevel=2)
            return None
        return value

    def put(self, text: str, value: Float32[np.ndarray, "s e"]) -> None:
        """Write an embedding, atomically.

        Raises:
          UserError: If the folder cannot be written.
        """
        with atomic_path(self.get_path(text)) as temporary:
            np.save(temporary, value, allow_pickle=False)


_MIN_LENGTH = 32
_BATCH_ROWS = 8
"""Rows of a batch, unless it has one. Lengths are a power of two or the limit, so a handful of programs serve all
texts. In a batch of eight, a caption of 24 tokens takes a third of the CPU time that it takes alone (8 layers of width
512)."""


@runtime_checkable
class FrozenEncoderConfig(Protocol):
    """The configuration of an encoder for an `Embedder`.

    Its module takes token ids and segment ids, one text per row and segment 0 at its padding; `values` [B S width] of
    its result are the embeddings.
    """

    @property
    def vocabulary(self) -> int:
        """Return the size of the vocabulary; token ids are below it."""

    @property
    def width(self) -> int:
        """Return the width of the embeddings."""

    def make(self, rngs: nnx.Rngs) -> nnx.Module: ...


def make_embedding_program(config: FrozenEncoderConfig) -> Callable[..., Any]:
    """Return the jitted function from parameters, token ids `B S` and segment ids `B S` to embeddings `B S width`."""
    graph = get_graph_def(config.make)
    return jax.jit(lambda params, ids, segments: nnx.merge(graph, params)(ids, segments).values)


class Embedder:
    """A function from texts to a frozen encoder's embeddings: `embed("a red ball")` has one vector per token.

    Padding exists during the computation only; it is masked and cut off, as Wan does, so that the vectors depend on the
    text alone. The other texts of a batch change nothing but rounding. Texts are not cleaned; `clean` them first if the
    model was trained that way.

    Threads may share an embedder and the arrays that it returns: they are read-only.
    """

    def __init__(
        self,
        config: FrozenEncoderConfig,
        params: Any,
        tokenizer: PretrainedTokenizer,
        *,
        identity: str,
        cache: str | os.PathLike | None = None,
        memory_bytes: int = 256 * 2**20,
        streams_layers: bool = False,
    ):
        """Create an embedder; `weights.load_embedder` makes one from a folder.

        Args:
          config: Configuration of the encoder.
          params: Its parameters, a nested dictionary; those in host memory are copied to the device for each call.
          tokenizer: The tokenizer that it was trained with.
          identity: Hash of config, weights, tokenizer and limit together; names a folder in `cache`.
          cache: Folder of embeddings, which other embedders and processes may share.
          memory_bytes: Bytes of embeddings to keep in memory.
          streams_layers: Moves layers in host memory to the device one at a time.

        Raises:
          UserError: If the tokenizer has tokens that the encoder has no embedding for.
        """
        if tokenizer.max_id >= config.vocabulary:
            raise UserError(
                f"the tokenizer's ids reach {tokenizer.max_id}, but the encoder has {config.vocabulary} "
                "embeddings; use the tokenizer that it was trained with"
            )
        self.identity = identity
        """Identifier of everything but the text that an embedding depends on."""
        self.width = config.width
        self.max_tokens = tokenizer.max_tokens
        """Maximum tokens of a text; a longer one is cut, with a warning."""
        self._tokenizer, self._params, self._streams_layers = tokenizer, params, streams_layers
        self._memory = MemoryCache(memory_bytes)
        self._folder = None if cache is None else FolderCache(cache, identity=identity, width=config.width)
        self._encode = make_embedding_program(config)

    def __call__(self, text: str) -> Float32[np.ndarray, "s e"]:
        """Return one vector per token of a text, the last for the end token, which the empty text has too."""
        return self.embed_many([text])[0]

    def count_tokens(self, text: str) -> int:
        """Return the length of the embedding of a text."""
        return len(self._tokenizer(text))

    def embed_many(self, texts: Sequence[str]) -> list[Float32[np.ndarray, "s e"]]:
        """Return the embeddings of texts in their order; faster than one by one."""
        embeddings: dict[str, np.ndarray] = {}
        missing: dict[str, np.ndarray] = {}
        for text in dict.fromkeys(texts):
            value = self._look_up(text)
            if value is None:
                missing[text] = self._tokenizer(text)
            else:
                embeddings[text] = value
        if not missing:
            return [embeddings[text] for text in texts]
        with move_to_devices(self._params, streams_layers=self._streams_layers) as params:
            for batch, length in self._make_batches(missing):
                values = self._encode_batch(params, [missing[text] for text in batch], length)
                for text, value in zip(batch, values, strict=True):
                    embeddings[text] = self._store(text, value)
                    if self._folder is not None:
                        self._folder.put(text, value)
        return [embeddings[text] for text in texts]

    def _look_up(self, text: str) -> np.ndarray | None:
        value = self._memory.get(text)
        if value is None and self._folder is not None:
            value = self._folder.get(text)
            if value is not None:
                value = self._store(text, value)
        return value

    def _store(self, text: str, value: np.ndarray) -> np.ndarray:
        value.flags.writeable = False
        self._memory.put(text, value)
        return value

    def _make_batches(self, ids: dict[str, np.ndarray]) -> Iterator[tuple[list[str], int]]:
        """Yield the texts of each batch and the length of its rows."""
        groups: dict[int, list[str]] = {}
        for text, tokens in ids.items():
            length = min(max(_MIN_LENGTH, 1 << (len(tokens) - 1).bit_length()), self.max_tokens)
            groups.setdefault(length, []).append(text)
        for length, group in sorted(groups.items()):
            # Full batches first; the rest one by one, so that there are programs for two batch sizes only.
            full = len(group) - len(group) % _BATCH_ROWS
            for start in range(0, full, _BATCH_ROWS):
                yield group[start : start + _BATCH_ROWS], length
            for text in group[full:]:
                yield [text], length

    def _encode_batch(self, params: Any, token_ids: list[Int32[np.ndarray, " _"]], length: int) -> list[np.ndarray]:
        ids = np.zeros((len(token_ids), length), np.int32)
        segments = np.zeros((len(token_ids), length), np.int32)
        for row, tokens in enumerate(token_ids):
            ids[row, : len(tokens)], segments[row, : len(tokens)] = tokens, 1
        values = np.asarray(self._encode(params, ids, segments))
        # Copies: a view would keep the whole batch in memory for as long as one of its texts is cached.
        return [values[row, : len(tokens)].copy() for row, tokens in enumerate(token_ids)]
