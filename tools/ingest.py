"""Make a data set of clips, in whatever way people hold them.

    python tools/ingest.py SOURCE DESTINATION
    python tools/ingest.py clips data --screening.shots content --screening.min-seconds 1 --screening.duplicates 4
    python tools/ingest.py clips data --reencode.max-pixels 409920 --reencode.fps 24

SOURCE is a folder of videos and images with captions beside them or in `metadata.csv`, a list of paths, WebDataset
tars, UCF-101 or MSR-VTT: see `dit_video.data.ingest.formats`. What can't be used is set aside and listed, with the
reason, in DESTINATION/report.json; DESTINATION/REPORT.html shows it. Files keep their bytes; with `--reencode` those
that are over a limit are stored anew, smaller. Started again after a kill, the command continues. What failed for a
reason that may pass (a file that could not be read, too little memory or time) is tried again by --retry.
"""

import contextlib
import io
import shlex
from typing import Annotated

import tyro

from dit_video.core.errors import UserError, script
from dit_video.core.storage import place
from dit_video.data.ingest import REPORT, IngestConfig, IngestReport, ingest
from dit_video.experiment.datasets import ingest_shown
from dit_video.reports.ingest_report import PAGE, write_ingest_report

Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
Destination = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
Config = Annotated[IngestConfig, tyro.conf.arg(name="")]


@script
def main(
    source: Source,
    destination: Destination,
    config: Config = IngestConfig(),  # noqa: B008  # frozen
    workers: int | None = None,
    beam: str | None = None,
    retry: bool = False,
) -> None:
    """Make a data set of clips.

    Args:
        source: a folder, a list of clips or a tar
        destination: the folder to be made, or an address that fsspec opens: gs://…
        config: what is taken
        workers: processes that inspect clips, at most; by default one for every core
        beam: build it by Apache Beam with these options, given with "=": --beam="--runner=FlinkRunner --parallelism=64"
        retry: try the clips again that failed for a reason that may pass, such as a file that could not be read
    """
    with ingest_shown() as progress:
        report = ingest(
            source,
            destination,
            config=config,
            progress=progress,
            workers=workers,
            beam=_beam(beam),
            retry=retry,
        )
    if not report.reused or not (place(destination) / PAGE).is_file():
        write_ingest_report(destination)
    _say(destination, report)


def _beam(options: str | None):
    if options is None:
        return None
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ModuleNotFoundError as error:
        raise UserError(
            "Apache Beam is not installed; pip install -e '.[beam]' into an environment of its own"
        ) from error
    from dit_video.data.records.cluster import Beam

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = PipelineOptions(shlex.split(options))
            parsed.get_all_options()
    except ValueError as error:
        raise UserError(f"--beam={options}: {error}; close the quotation") from error
    except SystemExit as error:  # argparse's, after all that Beam knows
        reason = said.getvalue().strip().rsplit("error: ", 1)[-1]
        raise UserError(f"--beam={options}: {reason}; see the options of Beam's runner") from error
    return Beam(options=parsed)


def _say(destination: str, report: IngestReport) -> None:
    print(f"{destination}: {report.usable} clips, {report.frames} frames" + (" (was there already)" * report.reused))
    if report.reencoded:
        sizes = f"{report.reencoded_from / 1e6:.3g} MB became {report.reencoded_to / 1e6:.3g} MB"
        print(f"{report.reencoded} files re-encoded: {sizes}")
    if report.uncaptioned:
        print(f"{report.uncaptioned} without a caption: they train the unconditional model alone")
    if report.unlisted:
        shown = ", ".join(report.unlisted[:3]) + (", …" if len(report.unlisted) > 3 else "")
        print(f"{len(report.unlisted)} files are no clips that the source lists, and were left out: {shown}")
    pairs = [*report.rejected, *report.quarantined, *report.dropped]
    for name, reason in pairs[:10]:
        print(f"set aside: {name}: {reason}")
    if len(pairs) > 10:
        print(f"… {len(pairs)} were set aside: see {destination}/{REPORT}")
    if report.passing:
        print(
            f"{len(report.passing)} of them failed for a reason that may pass, such as {report.passing[0]}; the same "
            "command with --retry tries those again, and no others"
        )
    print(f"see {destination}/{PAGE}")


if __name__ == "__main__":
    tyro.cli(main)
