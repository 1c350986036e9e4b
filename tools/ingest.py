"""Make a data set of clips from a folder, a list of paths, archives or a known data set."""

from dit_video.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

import contextlib
import io
import shlex
from typing import Annotated

import tyro

from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.core.storage import to_storage_path
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.data.ingest.report import REPORT, IngestReport
from dit_video.experiment.datasets import show_ingest_progress
from dit_video.reports.ingest_report import PAGE, write_ingest_report

Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
Destination = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
Config = Annotated[IngestConfig, tyro.conf.arg(name="")]


def main(
    source: Source,
    destination: Destination,
    config: Config = IngestConfig(),  # noqa: B008  # frozen
    workers: int | None = None,
    beam: str | None = None,
    retry: bool = False,
) -> None:
    """Make a data set of clips from a folder, a list of paths, archives or a known data set.

    For example:

        python tools/ingest.py SOURCE DESTINATION
        python tools/ingest.py clips data --screening.shots content --screening.min-seconds 1 --screening.duplicates 4
        python tools/ingest.py clips data --reencode.max-pixels 409920 --reencode.fps 24

    SOURCE is a folder of videos and images with captions in files next to them or in lists, a list of paths,
    WebDataset tars, UCF-101 or MSR-VTT: see `dit_video.data.ingest.formats`. Clips that cannot be used are skipped and
    listed with the reason in DESTINATION/report.json; DESTINATION/REPORT.html shows them. Files are stored unchanged,
    except that `--reencode` re-encodes those above a limit. If the command is killed, run it again to continue. With
    the option `--retry`, clips that failed for a temporary reason (a file that could not be read, too little memory or
    time) are tried again.

    Args:
        source: Folder, list of clips or tar file.
        destination: Folder to write, or an address that fsspec can open (gs://…).
        config: Settings of the ingest.
        workers: Maximum number of processes that inspect clips; one per core by default.
        beam: Options of Apache Beam, which then builds the data set: --beam="--runner=FlinkRunner --parallelism=64".
        retry: Try clips again that failed for a temporary reason, such as a file that could not be read.
    """
    check_minimum(1, workers=workers)
    with show_ingest_progress() as progress:
        report = ingest(
            source,
            destination,
            config=config,
            progress=progress,
            workers=workers,
            beam=_parse_beam_options(beam),
            retry=retry,
        )
    if not report.reused or not (to_storage_path(destination) / PAGE).is_file():
        write_ingest_report(destination)
    _print_summary(destination, report)


def _parse_beam_options(options: str | None):
    if options is None:
        return None
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ModuleNotFoundError as error:
        raise UserError(
            "--beam needs Apache Beam, which is not installed; use pip install -e '.[beam]' in a separate environment"
        ) from error
    from dit_video.data.records.cluster import BeamOptions

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
    return BeamOptions(options=parsed)


def _print_summary(destination: str, report: IngestReport) -> None:
    print(f"{destination}: {report.usable} clips, {report.frames} frames" + (" (was there already)" * report.reused))
    if report.reencoded:
        sizes = f"{report.reencoded_from / 1e6:.3g} MB became {report.reencoded_to / 1e6:.3g} MB"
        print(f"{report.reencoded} files re-encoded: {sizes}")
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
            "command with --retry to try only those again"
        )
    print(f"report: {destination}/{PAGE}")


if __name__ == "__main__":
    script(parse_arguments)(main)
