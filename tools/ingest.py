"""Make a data set of clips from a folder, a list of paths, archives or a known data set."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

import contextlib
import io
import shlex
from dataclasses import dataclass
from typing import Annotated

import tyro

from dit_video.apps.reports.ingest_report import PAGE, write_ingest_report
from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.curation.screening import ScreeningConfig
from dit_video.data.ingest.completion import discard_transient_parts
from dit_video.data.ingest.engine import (
    IngestConfig,
    RunParts,
    complete_ingest,
    ingest,
    plan_ingest,
    write_parts,
)
from dit_video.data.ingest.report import REPORT, IngestReport
from dit_video.experiment.datasets import show_ingest_progress

Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
Destination = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
Config = Annotated[IngestConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Processes of a cluster that share the work."""

    shard: int | None = None
    """Index of this process among --shards; it writes every n-th part."""
    shards: int | None = None
    """Number of processes that were started by a scheduler."""
    beam: str | None = None
    """Options of Apache Beam, which then writes the parts: --beam="--runner=FlinkRunner --parallelism=64"."""
    ray: bool = False
    """True to write the parts by Ray Data, on the cluster that RAY_ADDRESS names or on this machine."""

    def __post_init__(self) -> None:
        check_minimum(0, shard=self.shard)
        check_minimum(1, shards=self.shards)
        is_valid = self.shard is None if self.shards is None else self.shard is not None and self.shard < self.shards
        if not is_valid:
            raise UserError(
                f"--shard {self.shard} --shards {self.shards} is invalid: a shard is one of 0 to shards - 1. Use both."
            )
        if sum(each is not None for each in (self.shards, self.beam)) + self.ray > 1:
            raise UserError("--shards, --beam and --ray exclude each other: use one of them")


def main(
    source: Source,
    destination: Destination,
    config: Config = IngestConfig(screening=ScreeningConfig()),  # noqa: B008  # frozen
    cluster: Annotated[Cluster, tyro.conf.arg(name="")] = Cluster(),
    workers: int | None = None,
    retry: bool = False,
) -> None:
    """Make a data set of clips from a folder, a list of paths, archives or a known data set.

    For example:

        python tools/ingest.py SOURCE DESTINATION
        python tools/ingest.py clips data --screening.shots gradual --screening.min-seconds 1 --screening.duplicates 4
        python tools/ingest.py clips data --reencode.max-pixels 409920 --reencode.fps 24
        srun python tools/ingest.py gs://bucket/clips gs://bucket/data --shard $SLURM_PROCID --shards $SLURM_NTASKS

    SOURCE is a folder of videos and images with captions in files next to them or in lists, a list of paths,
    WebDataset tars, UCF-101 or MSR-VTT: see `dit_video.data.ingest.formats`. Clips that cannot be used are skipped and
    listed with the reason in DESTINATION/report.json; DESTINATION/REPORT.html shows them. Shots become clips of their
    own, without encoding them again; `--reencode` re-encodes those above a limit.

    If the command is killed, run it again to continue. If the source has grown or captions have changed, run it again
    to bring the data set up to date: only new files are read. With the option `--retry`, clips that failed for a
    temporary reason (a file that could not be read, too little memory or time) are tried again.

    Args:
        source: Folder, list of clips or tar file; or an address that fsspec can open (gs://…).
        destination: Folder to write, or an address (gs://…).
        config: Settings of the ingest.
        cluster: Processes of a cluster that share the work.
        workers: Maximum number of processes that inspect clips on this machine; one per core by default.
        retry: Write the parts again that have files which failed for a temporary reason, e.g. could not be read.
    """
    check_minimum(1, workers=workers)
    with show_ingest_progress() as progress:
        if cluster.shards is None:
            report: IngestReport | None = ingest(
                source,
                destination,
                config=config,
                progress=progress,
                workers=workers,
                retry=retry,
                run_parts=_make_engine(cluster),
            )
        else:
            folder = plan_ingest(source, destination, config=config)
            own = folder.parts[cluster.shard :: cluster.shards]
            if retry:
                discard_transient_parts(folder, own)
            parts = [part for part in folder.list_unfinished() if part in set(own)]
            write_parts(folder, parts, config=config, progress=progress, workers=workers)
            report = None if folder.list_unfinished() else complete_ingest(folder, config)
    if report is None:
        print(f"{destination}: process {cluster.shard} has written its parts; the last one writes the table")
        return
    write_ingest_report(destination)
    _print_summary(destination, report)


def _make_engine(cluster: Cluster) -> RunParts | None:
    if cluster.beam is None and not cluster.ray:
        return None
    from dit_video.data.ingest import clusters

    return (
        clusters.make_ray() if cluster.beam is None else clusters.make_beam(options=_parse_beam_options(cluster.beam))
    )


def _parse_beam_options(options: str) -> object:
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ModuleNotFoundError as error:
        raise UserError(
            "--beam needs Apache Beam, which is not installed; use pip install -e '.[beam]' in a separate environment"
        ) from error
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed = PipelineOptions(shlex.split(options))
            parsed.get_all_options()
    except ValueError as error:
        raise UserError(f"--beam={options} is invalid: {error}. Close the quotation") from error
    except SystemExit as error:  # argparse exits on an unknown or invalid option
        reason = stderr.getvalue().strip().rsplit("error: ", 1)[-1]
        raise UserError(f"--beam={options} is invalid: {reason}. Use the options of Beam's runner") from error
    return parsed


def _print_summary(destination: str, report: IngestReport) -> None:
    print(f"{destination}: {report.usable} clips, {report.frames} frames" + (" (was there already)" * report.reused))
    for method, text in (("copy", "cut from their files without encoding"), ("encode", "re-encoded")):
        if method in report.methods:
            print(f"{report.methods[method]} clips {text}")
    if report.uncaptioned:
        print(f"{report.uncaptioned} clips have no caption: they train only the unconditional model")
    if report.unlisted:
        examples = ", ".join(report.unlisted[:3]) + (", …" if len(report.unlisted) > 3 else "")
        print(f"{len(report.unlisted)} files are not listed by the source and were skipped: {examples}")
    pairs = [*report.rejected, *report.quarantined, *report.dropped]
    for name, reason in pairs[:10]:
        print(f"skipped: {name}: {reason}")
    if len(pairs) > 10:
        print(f"… {len(pairs)} were skipped: see {destination}/{REPORT}")
    if report.passing:
        print(
            f"{len(report.passing)} of them failed for a temporary reason, such as {report.passing[0]}; run the same "
            "command with --retry to write the parts with those again"
        )
    print(f"report: {destination}/{PAGE}")


if __name__ == "__main__":
    script(parse_arguments)(main)
