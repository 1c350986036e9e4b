"""Inspection of one file by reading all of it, and cutting of its clips; runs in a process that may be lost.

The outcomes of a file partition its duration: every microsecond of the source is in exactly one of them.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from dit_video.core.errors import DecodeError, UserError
from dit_video.core.files import atomic_path
from dit_video.core.storage import is_remote
from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.reencoder import ReencodeConfig, reencode_image, update_facts
from dit_video.data.ingest.screening import JudgedShot, Screening, ScreeningResult, Shot
from dit_video.video import probe
from dit_video.video.cut import CutClip, TimeSpan, cut_clips
from dit_video.video.reader import IMAGE_CODECS, Video

OutcomeKind = Literal["kept", "dropped", "cut", "unreadable"]
"""A clip that is kept; one that the screening dropped; a part too short for a clip; a file that is broken."""
MAX_CLIP_BYTES = (1 << 31) - (1 << 20)
"""Maximum size of a clip: a record is one protocol buffer, which holds less than 2 GiB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A part of a source file, and what became of it."""

    name: str
    """Name of the file, followed by `#0`, `#1`, … if it has several parts."""
    kind: OutcomeKind
    reason: str = ""
    """Reason why the part is not kept."""
    transient: bool = False
    """True if the reason is transient rather than the file's own fault: a file that could not be read or was being
    written, too little memory, too little time."""
    start_us: int = 0
    """Start of the part in the file, in microseconds after its first frame."""
    duration_us: int = 0
    """Duration of the part in microseconds: each frame is shown until the next one."""
    shot: Shot | None = None
    """Facts and measures of the clip as it is stored; None if the file is broken."""
    payload: str = ""
    """SHA-256 of the clip's bytes, in hexadecimal; empty if none are stored."""
    payload_bytes: int = 0
    """Number of these bytes."""
    file: str | None = None
    """File that holds the bytes until they are stored; None if they are the source file."""
    method: str = ""
    """Origin of the bytes: the "whole" file, a "copy" of packets, or "encode" for encoded pictures."""
    audio: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Facts of the sound by the names of columns: codec, rate, channels, offset."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value, for exchange between processes."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Outcome":
        """Return the outcome that `to_json` wrote."""
        return Outcome(**value | {"shot": None if value["shot"] is None else Shot.from_json(value["shot"])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectionConfig:
    """Configuration of the inspection of every file."""

    screening: Screening = dataclasses.field(default_factory=Screening)
    """Shots of a file, and which of them are kept."""
    reencode: ReencodeConfig = dataclasses.field(default_factory=ReencodeConfig)
    """Limits above which clips are re-encoded."""
    max_lead_in: float | int = 0.5
    """Maximum size of what a clip holds of the time before it, relative to its own."""
    folder: str = ""
    """Folder of the clips that are not whole source files, until they are stored."""


class Inspection(NamedTuple):
    """Outcomes of a file."""

    outcomes: tuple[Outcome, ...] = ()
    """Parts of the file, in their order, at least one."""
    sha256: str = ""
    """SHA-256 of the file's bytes, in hexadecimal; empty if it could not be read."""

    @property
    def reason(self) -> str:
        """Return the reason why the whole file is unusable; empty if it is not."""
        return self.outcomes[0].reason if self.outcomes[0].kind == "unreadable" else ""

    @property
    def transient(self) -> bool:
        """Return whether that reason is transient: such a file is inspected again."""
        return self.outcomes[0].transient

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value, for exchange between processes."""
        return {"outcomes": [outcome.to_json() for outcome in self.outcomes], "sha256": self.sha256}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Inspection":
        """Return the inspection that `to_json` wrote."""
        return Inspection(tuple(map(Outcome.from_json, value["outcomes"])), value["sha256"])


def make_failure(clip: ListedClip, reason: str, *, transient: bool = False, sha256: str = "") -> Inspection:
    """Return the inspection of a file without anything that can be used."""
    return Inspection((Outcome(name=clip.name, kind="unreadable", reason=reason, transient=transient),), sha256)


def inspect(clip: ListedClip, config: InspectionConfig) -> Inspection:
    """Read, decode and screen a file, and cut its clips; every failure becomes its outcome.

    Raises:
      UserError: If the screening cannot work for any file, or the disk is full.
    """
    try:
        encoded = clip.read()
    except MemoryError:
        return make_failure(clip, "needs more memory to read than there is", transient=True)
    except OSError as error:
        return make_failure(clip, f"cannot be read ({error.strerror or error})", transient=True)
    if len(encoded) != clip.size:
        reason = f"changed from {clip.size} to {len(encoded)} bytes since it was listed; leave it alone"
        return make_failure(clip, reason, transient=True)
    sha256 = hashlib.sha256(encoded).hexdigest()
    try:
        screened = config.screening.screen(encoded, clip.name)
        outcomes = list(_cut_outcomes(encoded, clip, sha256, screened, config))
    except DecodeError as error:
        is_transient = _is_out_of_memory(error.__cause__)
        return _add_duration(make_failure(clip, str(error), transient=is_transient, sha256=sha256), encoded)
    except UserError:
        raise
    except Exception as error:  # from a decoder or encoder: an unforeseen kind of file must not end the run
        if _is_out_of_memory(error):
            return make_failure(clip, "needs more memory to decode than there is", transient=True, sha256=sha256)
        message = " ".join(str(error).split())
        failure = make_failure(clip, f"cannot be decoded ({type(error).__name__}: {message})", sha256=sha256)
        return _add_duration(failure, encoded)
    return Inspection(tuple(outcomes), sha256)


def _cut_outcomes(
    encoded: bytes, clip: ListedClip, sha256: str, screened: ScreeningResult, config: InspectionConfig
) -> Iterator[Outcome]:
    """Yield the outcomes of a file in their order, after its clips were written into the folder."""
    parts = screened.shots
    kept = [part for part in parts if not part.reason]
    cuts = _cut_kept(encoded, screened, kept, config)
    for part in parts:
        start, stop = round(part.shot.start * 1e6), round(part.stop * 1e6)
        outcome = Outcome(
            name=part.shot.name,
            kind="kept",
            start_us=start,
            duration_us=stop - start,
            shot=part.shot,
            reason=part.reason,
        )
        if part.reason:
            yield dataclasses.replace(outcome, kind="cut" if part.is_cut else "dropped")
        else:
            yield dataclasses.replace(outcome, **_store(part, next(cuts), clip, sha256, config))


def _cut_kept(
    encoded: bytes, screened: ScreeningResult, parts: Sequence[JudgedShot], config: InspectionConfig
) -> Iterator[CutClip]:
    """Yield the file of each kept part."""
    facts, limits = screened.facts, config.reencode
    if facts.frames == 1 and facts.codec in IMAGE_CODECS:
        for part in parts:
            is_large = limits.is_exceeded(facts, part.shot)
            content = reencode_image(encoded, facts, limits) if is_large else encoded
            yield CutClip(content, "", "encode" if is_large else "whole", None)
        return

    def get_options(part: JudgedShot) -> dict[str, Any]:
        if not limits.is_exceeded(facts, part.shot):
            return {"mode": "copy", "max_lead_in": config.max_lead_in, "crf": limits.crf}
        height, width = limits.fit_size(part.shot.height, part.shot.width, 2)
        rate = limits.get_rate(facts)
        return {"mode": "encode", "height": height, "width": width, "fps": rate, "crf": limits.crf}

    # Parts with the same options are cut in one pass over the file.
    for options, group in itertools.groupby(parts, get_options):
        spans = [TimeSpan(s.start, s.start + s.seconds, is_whole=s.frames == facts.frames) for s, *_ in group]
        yield from cut_clips(encoded, spans, **options)


def _store(part: JudgedShot, cut: CutClip, clip: ListedClip, sha256: str, config: InspectionConfig) -> dict[str, Any]:
    """Return the fields of the outcome of a kept part, after its bytes were written into the folder."""
    if len(cut.content) > MAX_CLIP_BYTES:
        size = f"{len(cut.content) / 2**30:.1f} GiB in one clip, 2 GiB is the limit"
        fix = "cut it with tools/ingest.py --screening.max-clip-seconds …, or re-encode it with --reencode.max-pixels …"
        raise DecodeError(f"{size}; {fix}")
    fields: dict[str, Any] = {"payload": sha256, "payload_bytes": len(cut.content), "method": cut.method}
    fields["shot"] = dataclasses.replace(part.shot, start=0.0)
    if cut.method == "encode":  # pictures of another size or rate
        fields["shot"] = update_facts(part.shot, probe(cut.content))
    if cut.audio is not None:
        fields["audio"] = {name: getattr(cut.audio, name) for name in ("codec", "rate", "channels", "offset")}
    if cut.method != "whole" or is_remote(clip.path):  # else the source file is read again when it is stored
        fields["payload"] = hashlib.sha256(cut.content).hexdigest()
        fields["file"] = os.path.join(config.folder, hashlib.sha256(part.shot.name.encode()).hexdigest())
        try:
            with atomic_path(fields["file"]) as temporary:
                temporary.write_bytes(cut.content)
        except OSError as error:
            fix = "free disk space or make it writable, and run the command again"
            raise UserError(f"{config.folder} cannot be written ({error.strerror or error}); {fix}") from error
    return fields


def _add_duration(failure: Inspection, encoded: bytes) -> Inspection:
    """Return the inspection of a broken file with the duration that its header claims."""
    seconds = 0.0
    with contextlib.suppress(Exception), Video(encoded) as video:
        seconds = video.claimed_seconds
    (outcome,) = failure.outcomes
    return failure._replace(outcomes=(dataclasses.replace(outcome, duration_us=round(seconds * 1e6)),))


def _is_out_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
