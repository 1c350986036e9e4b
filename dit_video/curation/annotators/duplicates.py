"""Near-duplicates by the embeddings of CLIP: clips that were trimmed, mirrored or re-encoded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from dit_video.core.errors import UserError
from dit_video.curation.annotator import Column, TableAnnotator
from dit_video.curation.annotators.clip_scores import THUMBNAIL_SIDE
from dit_video.curation.near_duplicates import find_near_duplicates


@dataclass(frozen=True, kw_only=True)
class Duplicates(TableAnnotator):
    """Clips that nearly equal one before them in the table."""

    threshold: float = 0.97
    """Cosine of embeddings from which on two clips may be near-duplicates."""
    min_match: float = 0.92
    """Mean correlation of thumbnails of their frames from which on they are. Second takes of a scene have less, and so
    have copies with another crop; 0 compares embeddings alone."""

    @property
    def name(self) -> str:
        return "duplicates"

    @property
    def columns(self) -> Mapping[str, Column]:
        return {
            "near_duplicate_of": Column(
                type=pa.string(), description="Name of the first clip that it nearly equals; null for none."
            ),
            "near_duplicate_similarity": Column(
                type=pa.float32(), description="Cosine of the embeddings of both; null for none."
            ),
        }

    @property
    def needs(self) -> Mapping[str, str]:
        return {"embedding": "clip", "thumbnails": "clip"}

    @property
    def identity(self) -> str:
        return f"duplicates 1, threshold {self.threshold:g}, match {self.min_match:g}"

    def annotate_table(self, names: list[str], columns: Mapping[str, pa.ChunkedArray]) -> Mapping[str, Any]:
        if not pa.types.is_large_binary(columns["thumbnails"].type):
            raise UserError("the thumbnails are of an older version. Use tools/annotate.py DATA clip before")
        side = THUMBNAIL_SIDE

        def read_thumbnails(clip: int) -> UInt8[np.ndarray, "n h w"]:
            content = columns["thumbnails"][clip].as_py() or bytes(side**2)
            return np.frombuffer(content, np.uint8).reshape(-1, side, side)

        originals, similarities = find_near_duplicates(
            to_matrix(columns["embedding"]), read_thumbnails, threshold=self.threshold, min_match=self.min_match
        )
        return {
            "near_duplicate_of": [None if original < 0 else names[original] for original in originals],
            "near_duplicate_similarity": pa.array(similarities, mask=np.isnan(similarities)),
        }


def to_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of lists of one length as a matrix; a null is a row of NaN."""
    values = column.combine_chunks()
    flat = values.flatten().to_numpy(zero_copy_only=False)
    is_valid = values.is_valid().to_numpy(zero_copy_only=False)
    matrix = np.full((len(values), values.type.list_size), np.nan, np.float32)
    matrix[is_valid] = flat.reshape(-1, values.type.list_size)
    return matrix
