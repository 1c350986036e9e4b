"""Add columns to a data set of clips: camera motion, CLIP scores, near-duplicates, text, captions."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import tyro

from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.curation.annotate import (
    AnnotationReport,
    annotate,
    annotate_table,
    check_clips,
    compute_keys,
    find_pending,
)
from dit_video.curation.annotator import Annotator, AnyAnnotator
from dit_video.curation.annotators import ANNOTATORS, check_names
from dit_video.curation.camera_motion import MotionVectors
from dit_video.curation.captions import Captions
from dit_video.curation.clip_scores import ClipScores
from dit_video.curation.near_duplicates import Duplicates
from dit_video.curation.statistics import format_histograms, make_histogram
from dit_video.curation.text_area import TextArea
from dit_video.data.clips import ClipSource
from dit_video.data.tables import take_rows
from dit_video.training.hooks.logging import Progress

Data = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
Names = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the annotators."""

    motion_vectors: MotionVectors = field(default_factory=MotionVectors)
    clip: ClipScores = field(default_factory=ClipScores)
    duplicates: Duplicates = field(default_factory=Duplicates)
    text_area: TextArea = field(default_factory=TextArea)
    captions: Captions = field(default_factory=Captions)


def main(
    data: Data,
    names: Names = (),
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),  # frozen
    where: str = "",
    shard: int = 0,
    shards: int = 1,
    retry: bool = False,
    max_price: float = 1.0,
    yes: bool = False,
    list: bool = False,
) -> None:
    """Add columns to a data set of clips, which conditions such as `--data.where "camera_pan > 0.1"` select by.

    For example:

        python tools/annotate.py DATA motion_vectors
        python tools/annotate.py DATA clip duplicates --clip.folder clip-vit-large-patch14
        python tools/annotate.py DATA captions --captions.server.model qwen --where "motion > 5" --shard 0 --shards 4
        python tools/annotate.py DATA --list

    NAME is motion_vectors, clip, duplicates, text_area or captions. Values are written to DATA/columns/NAME.parquet; no
    clip is changed. Run the same command again after it was killed, or when clips were added: only clips without values
    are computed. Clips that cannot be annotated have the reason in the column NAME_error.

    Args:
        data: Data set written by tools/ingest.py: a folder or an address (gs://…).
        names: Annotators, in the order in which they run.
        settings: Settings of the annotators.
        where: Condition on columns; other clips are not annotated.
        shard: Index of this process.
        shards: Number of processes, which share the clips; the last one to end writes the columns.
        retry: Annotate the clips again that could not be annotated.
        max_price: Price above which, or if it is not known, --yes is needed.
        yes: Go on whatever it costs.
        list: Print all columns with a histogram, and annotate nothing.
    """
    check_minimum(0, shard=shard)
    check_minimum(1, shards=shards)
    if list:
        print_columns(ClipSource(data, where=where))
        return
    check_names(names)
    annotators: Sequence[AnyAnnotator] = [getattr(settings, name) for name in names]
    for annotator in annotators:
        if isinstance(annotator, Annotator):
            annotator.check()
    pending = 0
    for annotator in annotators:
        source = ClipSource(data, where=where)  # with the columns of the annotator before
        if isinstance(annotator, Annotator):
            _check_price(source, annotator, max_price, yes=yes, retry=retry)
            pending += _annotate(source, annotator, shard=shard, shards=shards, retry=retry).pending
        elif pending:
            print(f"{annotator.name} is left to the process that ends last, as it reads the columns of all clips")
        else:
            annotate_table(source, annotator)
            print(f"{data}: columns {', '.join(annotator.columns)}")


def _check_price(source: ClipSource, annotator: Annotator, max_price: float, *, yes: bool, retry: bool) -> None:
    check_clips(source)
    blocks = find_pending(source, annotator, compute_keys(source, annotator), retry=retry)
    clips = np.concatenate([np.zeros(0, int), *(block.clips for block in blocks)])
    cost = annotator.estimate_cost([source.infos[int(clip)] for clip in clips])
    if not cost.text or not len(clips):
        return
    print(f"{annotator.name} of {len(clips)} clips: {cost.text}", file=sys.stderr)
    if not yes and (cost.price is None or cost.price > max_price):
        reason = "an unknown price" if cost.price is None else f"a price of up to {cost.price:.2f}"
        raise UserError(f"{annotator.name} has {reason}, above --max-price {max_price:g}. Use --yes to go on")


def _annotate(source: ClipSource, annotator: Annotator, *, shard: int, shards: int, retry: bool) -> AnnotationReport:
    with contextlib.ExitStack() as ending, Progress(f"annotating {annotator.name}", len(source), unit="clip") as bar:
        ending.callback(_print_work, annotator)  # also if it fails

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        report = annotate(source, annotator, shard=shard, shards=shards, retry=retry, progress=show)
    print(
        f"{source.folders[0]}: {annotator.name} of {report.computed} clips"
        + " (others have it)" * (not report.computed)
    )
    for name, reason in [*report.failures.items()][:10]:
        print(f"without values: {name}: {reason}")
    if len(report.failures) > 10:
        print(f"… {len(report.failures)} have none: see the column {annotator.name}_error")
    if report.pending:
        print(f"{report.pending} clips are left to other processes; the last of {shards} writes the columns")
    return report


def _print_work(annotator: Annotator) -> None:
    if summary := annotator.summarize():
        print(summary)


def print_columns(source: ClipSource) -> None:
    """Print a histogram of each column of the clips."""
    check_clips(source)
    table = source.tables[0]
    ids = set(source.column("id").tolist())
    rows = np.array([row for row, each in enumerate(table["id"].tolist()) if each in ids])
    histograms = [make_histogram(name, take_rows(table.arrow(name), rows)) for name in table.names]
    print(format_histograms(histograms))


if __name__ == "__main__":
    assert set(ANNOTATORS) == set(Settings.__dataclass_fields__)
    script(parse_arguments)(main)
