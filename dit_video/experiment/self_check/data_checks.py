"""Checks of the data: clips, cached latents and embeddings against their files, and rows against their examples.

A small data set is checked as a whole; of a large one, as many random examples as the time allows.
"""

import io
from collections.abc import Iterator, Sequence

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Float32, UInt8

from dit_video.core.errors import DecodeError
from dit_video.data.buckets import BucketPlanner
from dit_video.data.clips import ClipInfo
from dit_video.data.examples import Entry
from dit_video.data.latents.codec import LatentCodec
from dit_video.data.latents.plan import View, list_views
from dit_video.data.packing.plan import RowPlanner
from dit_video.data.sizes import count_sampled_frames, fit_size, read_fitted_clip
from dit_video.experiment.self_check.subject import CheckedTraining, Problem, iterate_within
from dit_video.tokens import PackedBatch, PackedShape
from dit_video.weights.frozen_encoders import FrozenTextEncoder

SECONDS = 10.0
"""Time for each check."""
_MIN_EXAMPLES = 2
_LATENT_TOLERANCE = 0.05
"""Largest difference of latents, relative to their root mean square. Storage in int8 has up to 0.02."""
_TEXT_TOLERANCE = 0.02
_PIXEL_TOLERANCE = 12.0
"""Largest difference of mean colours of blocks, of 255. Another decoder may convert colours by another matrix."""
_MIN_DISTANCE = 0.5
"""Smallest mean distance of colours between frames, of 255, by which one is told from another."""
_RATE_TOLERANCE = 0.02
_BLOCKS = 4
_TIME_TOLERANCE = 1e-3
"""Seconds by which a time stamp may be rounded."""


def check_held_out(subject: CheckedTraining) -> list[Problem]:
    """Check that no held-out clip is trained on, nor one with the same bytes."""
    held_out, clips = subject.run.held_out_clips, subject.clips
    names = {*held_out.column("name"), *subject.run.data.held_out}
    payloads = {payload for payload in held_out.column("payload") if payload}
    trained = subject.clip_names if subject.latents is None else pa.array(subject.latents.clips, pa.string())
    problems = [f"{name} is held out, but trained on" for name in _find_common(trained, trained, names)]
    for name in _find_common(subject.clip_names, pa.array(clips.column("payload"), pa.string()), payloads):
        problems.append(f"{name} has the same bytes as a held-out clip, under another name")
    return [Problem("held_out", each) for each in problems]


def _find_common(names: pa.Array, values: pa.Array, requested: set[str]) -> list[str]:
    """Return the names whose values are among those that are requested."""
    is_wanted = pc.is_in(values, value_set=pa.array(sorted(requested), pa.string()))
    return sorted(set(names.filter(is_wanted).to_pylist()))


def check_frames(subject: CheckedTraining) -> list[Problem]:
    """Check the frames and rates of clips against their files, which PyAV decodes a second time."""
    generator, limits = subject.make_generator("frames"), subject.run.limits
    problems = []
    order = generator.permutation(len(subject.clips)).tolist()
    for number in iterate_within(SECONDS, order, minimum=_MIN_EXAMPLES):
        info = subject.clips.infos[number]
        start = int(generator.integers(1 + count_sampled_frames(info, limits) - fit_size(info, limits).t))
        if message := _check_clip(subject, number, info, start):
            problems.append(Problem("frames", f"{info.name}: {message}"))
    return problems


def _check_clip(subject: CheckedTraining, number: int, info: ClipInfo, start: int) -> str:
    """Return what is wrong with a clip that is read from one of its frames on; empty if nothing is."""
    limits = subject.run.limits
    try:
        clip = read_fitted_clip(subject.clips, number, limits, start=start)
    except DecodeError:  # the training passes over it, too
        return ""
    stored = _decode_blocks(subject.clips[number])
    if stored is None:
        return ""
    times, blocks = stored
    rate = (len(times) - 1) / times[-1] if times[-1] > 0 else info.fps
    if abs(info.fps / rate - 1) > _RATE_TOLERANCE:
        return f"its file has {rate:.2f} frames per second, its entry in the table {info.fps:.2f}"
    sampled = rate if limits.fps is None else min(rate, limits.fps)
    if abs(clip.fps / sampled - 1) > _RATE_TOLERANCE:
        return f"it is sampled at {clip.fps:.2f} frames per second, instead of at {sampled:.2f}"
    frame_times = np.asarray([start, *range(start + 1, start + len(clip.frames))]) / sampled
    indices = np.searchsorted(times, frame_times + _TIME_TOLERANCE, side="right") - 1
    expected, actual = blocks[indices], _average_blocks(clip.frames)
    distances = np.abs(actual[:, None] - blocks[None]).mean(axis=(2, 3, 4))
    error = float(np.abs(actual - expected).mean())
    is_moved = error > _MIN_DISTANCE + 2 * distances.min(axis=1).mean()
    if not is_moved and np.sqrt(np.square(actual - expected).mean()) <= _PIXEL_TOLERANCE:
        return ""
    changes = {
        "it is mirrored": expected[:, :, ::-1],
        "it is upside down": expected[:, ::-1],
        "its frames are reversed in time": expected[::-1],
        "red and blue are swapped": expected[..., ::-1],
    }
    errors = {name: float(np.abs(actual - each).mean()) for name, each in changes.items()}
    best = min(errors, key=lambda name: errors[name])
    if errors[best] < 0.5 * error:
        return best
    nearest = distances.argmin(axis=1)
    return (
        f"its frames are not those shown from {frame_times[0]:.2f} s on, every {1 / sampled:.3f} s: the nearest frames "
        f"of the file are {nearest[:4].tolist()} instead of {indices[:4].tolist()}"
    )


def _decode_blocks(content: bytes) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n b b 3"]] | None:
    """Return the time of each frame of a file, and the mean colours of its blocks.

    Returns:
      None for files whose frames are not shown as they are stored (rotated, interlaced, in HDR, of pixels that are not
      square), and for still images.
    """
    times, blocks = [], []
    try:
        with av.open(io.BytesIO(content), mode="r") as container:
            stream = container.streams.video[0]
            aspect = stream.sample_aspect_ratio
            if (aspect and aspect != 1) or container.format.name.endswith("_pipe"):
                return None
            for frame in container.decode(stream):
                is_plain = not frame.rotation and not frame.interlaced_frame and frame.color_trc not in (16, 18)
                if not is_plain or frame.pts is None or not frame.time_base:
                    return None
                times.append(float(frame.pts * frame.time_base))
                blocks.append(_average_blocks(frame.to_ndarray(format="rgb24")[None])[0])
    except (av.FFmpegError, LookupError, ValueError):
        return None
    return (np.asarray(times) - times[0], np.stack(blocks)) if times else None


def _average_blocks(frames: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "T b b 3"]:
    """Return the mean colours of 4 by 4 blocks of each frame, whose sizes may differ by a pixel."""
    rows = np.array_split(frames.astype(np.float64), _BLOCKS, axis=1)
    blocks = [[part.mean(axis=(1, 2)) for part in np.array_split(row, _BLOCKS, axis=2)] for row in rows]
    return np.stack([np.stack(row, axis=1) for row in blocks], axis=1)


def check_latents(subject: CheckedTraining) -> list[Problem]:
    """Check cached latents against their clips, each encoded alone."""
    latents, encoding = subject.latents, subject.encoding
    if latents is None or encoding is None:
        return []
    codec, problems = LatentCodec(encoding.autoencoder, encoding.params), []
    encoded: dict[str, Float32[np.ndarray, "t h w c"]] = {}
    order = subject.make_generator("latents").permutation(len(latents)).tolist()
    wrong: list[int] = []
    for index in iterate_within(SECONDS, order, minimum=_MIN_EXAMPLES):
        view = _find_view(subject, index)
        try:
            stored = latents[index]
            frames = read_fitted_clip(subject.clips, view.clip, view.limits, start=view.start).frames
        except DecodeError:
            continue
        frames = np.ascontiguousarray(frames[:, :, ::-1]) if view.flipped else frames
        encoded[latents.names[index]] = expected = codec.encode_pixels(frames)
        if stored.shape != expected.shape or _compare(stored, expected) > _LATENT_TOLERANCE:
            wrong.append(index)
    for index in wrong:
        problems.append(f"{latents.names[index]}: {_explain_latents(latents[index], latents.names[index], encoded)}")
    return [Problem("latents", each) for each in problems]


def _find_view(subject: CheckedTraining, index: int) -> View:
    """Return the view of a clip whose latents have this index."""
    latents, encoding = subject.latents, subject.encoding
    assert latents is not None
    assert encoding is not None
    number = subject.find_clip(index)
    views = list_views([subject.clips.infos[number]], encoding.limits, encoding.augmentations)
    view = next((each for each in views if each.name == latents.names[index]), views[0])
    return view._replace(clip=number)


def _compare(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the root mean square of the difference, relative to the expected values."""
    return float(np.sqrt(np.square(actual - expected).mean() / max(np.square(expected).mean(), 1e-12)))


def _explain_latents(stored: np.ndarray, name: str, encoded: dict[str, np.ndarray]) -> str:
    """Return in which way stored latents differ from the clip encoded again."""
    expected = encoded[name]
    for other, values in encoded.items():
        if other != name and values.shape == stored.shape and _compare(stored, values) < _LATENT_TOLERANCE:
            return f"its latents are those of {other}"
    if stored.shape != expected.shape:
        return f"its latents have shape {list(stored.shape)}, those of its clip {list(expected.shape)}"
    for text, values in _iterate_changes(expected):
        if values.shape == stored.shape and _compare(stored, values) < _LATENT_TOLERANCE:
            return f"its latents are {text}"
    slopes = [np.polyfit(expected[..., c].ravel(), stored[..., c].ravel(), 1) for c in range(expected.shape[-1])]
    scale, shift = np.abs(np.asarray(slopes)).max(axis=0)
    fitted = np.stack([np.polyval(slope, expected[..., c]) for c, slope in enumerate(slopes)], axis=-1)
    if _compare(stored, fitted) < _LATENT_TOLERANCE:
        return f"its latents are normalised in another way: scaled by up to {scale:.2f}, shifted by up to {shift:.2f}"
    return (
        f"its latents differ by {_compare(stored, expected):.0%} from its clip encoded again. Were they made by "
        "another autoencoder, or of other frames? Encode the clips again, into another folder"
    )


def _iterate_changes(values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield "reversed in time", values[::-1]
    yield "mirrored", values[:, :, ::-1]
    yield "upside down", values[:, ::-1]
    yield "transposed", values.swapaxes(1, 2)
    yield "in another order of channels", values[..., ::-1]


def check_latent_statistics(subject: CheckedTraining, tokens: Float[np.ndarray, "n p"]) -> list[Problem]:
    """Check that latents are normalised: means near 0 and standard deviations near 1 in each channel.

    Args:
      subject: The training.
      tokens: Tokens of clips in the first batches, without padding.
    """
    values = tokens.reshape(-1, subject.model.autoencoder.channels)
    mean, std = values.mean(axis=0), values.std(axis=0)
    overall = float(np.sqrt(np.square(values).mean()))
    if 0.4 < overall < 2.5 and np.abs(mean).max() < 2 and std.min() > 0.1 and std.max() < 4:
        return []
    channel = int(np.argmax(np.maximum(np.abs(mean), np.abs(np.log(np.maximum(std, 1e-6))))))
    return [
        Problem(
            "latent_statistics",
            f"the root mean square of latents is {overall:.2f}, and channel {channel} has mean {mean[channel]:.2f} and "
            f"standard deviation {std[channel]:.2f}. Normalised ones have about 1, 0 and 1",
        )
    ]


def check_text_embeddings(subject: CheckedTraining) -> list[Problem]:
    """Check cached embeddings of captions against those that the encoder computes now."""
    text_encoder, latents = subject.text_encoder, subject.latents
    if not isinstance(text_encoder, FrozenTextEncoder) or latents is None or not latents.text_width:
        return []
    problems = []
    encode = FrozenTextEncoder(text_encoder.config)  # without its cache
    order = subject.make_generator("text").permutation(len(latents)).tolist()
    for index in iterate_within(SECONDS, order, minimum=_MIN_EXAMPLES):
        if not latents.all_captions[index]:
            continue
        caption = latents.all_captions[index][0]
        stored, expected = latents.read_text(index), encode(caption)
        if stored.shape != expected.shape or _compare(stored, expected) > _TEXT_TOLERANCE:
            problems.append(
                f"{latents.names[index]}: the embedding of {caption!r} differs from the encoder's. Was it made by "
                "another encoder, or of another caption? Encode the clips again, into another folder"
            )
    empty = encode("")
    if latents.empty_text is not None and _compare(np.resize(latents.empty_text, empty.shape), empty) > _TEXT_TOLERANCE:
        problems.append("the embedding of the empty caption differs from the encoder's")
    return [Problem("text_embeddings", each) for each in problems]


_MAX_CORRELATION = 0.9
"""Correlation of the examples' order with the data set's at which they count as not shuffled."""
_MAX_ROWS = 16
"""Number of rows of a batch that are checked."""
_MIN_ROWS = 4
"""Smallest number of rows by which two epochs are compared."""
_MAX_EQUAL_ROWS = 0.8
"""Share of rows that two epochs have in common, from which they count as the same."""
_MIN_ORDERED = 12
"""Smallest number of examples whose order says something."""
_MAX_EXAMPLES = 1_000_000
"""Largest number of examples for which two epochs are planned at once."""


def check_rows(subject: CheckedTraining, rows: PackedBatch, entries: Sequence[Sequence[Entry]]) -> list[Problem]:
    """Check the arrays of a batch against the examples that the plan puts into its rows."""
    problems: list[Problem] = []
    for number, row_entries in enumerate(entries[:_MAX_ROWS]):
        row = _Row(subject, rows, number)
        problems += row.check(row_entries)
    return problems


def check_repeated_examples(entries: Sequence[Sequence[Entry]]) -> list[Problem]:
    """Check that the rows of a batch do not have an example of an epoch twice."""
    keys = [entry.draw for row_entries in entries for entry in row_entries]
    count = len(keys) - len(set(keys))
    return [Problem("order", f"a batch has {count} examples of one epoch more than once")] if count else []


class _Row:
    """One row of a batch, with checks of its segments."""

    def __init__(self, subject: CheckedTraining, rows: PackedBatch, number: int):
        self._subject, self._number = subject, number
        self._tokens, self._positions = rows.tokens[number], rows.positions[number]
        self._segments, self._valid = np.asarray(rows.segments[number]), rows.valid[number]
        self._text, self._text_segments = rows.text[number], np.asarray(rows.text_segments[number])
        self._ranks = rows.examples[number]

    def check(self, entries: Sequence[Entry]) -> list[Problem]:
        problems = []
        expected_segments = []
        for index, entry in enumerate(entries):
            places = np.flatnonzero(self._segments == index + 1)
            problems += self._check_segment(index, entry, places)
            expected_segments += [index + 1] * len(self._make_positions(entry.example))
        if isinstance(self._subject.model.layout, PackedShape):
            padded = np.pad(expected_segments, (0, max(0, len(self._segments) - len(expected_segments))))
            if not np.array_equal(padded, self._segments):
                first = int(np.flatnonzero(padded != self._segments)[0])
                problems.append(self._make(f"token {first} is in segment {self._segments[first]}, not {padded[first]}"))
        if (extra := int(self._segments.max(initial=0))) > len(entries):
            problems.append(self._make(f"it has {extra} segments, but {len(entries)} clips"))
        return problems

    def _check_segment(self, index: int, entry: Entry, places: np.ndarray) -> list[Problem]:
        latents, name = self._subject.latents, self._get_name(entry.example)
        problems = []
        positions = self._make_positions(entry.example)
        if len(places) != len(positions):
            return [self._make(f"{name} has {len(places)} tokens, not {len(positions)}")]
        if int(self._ranks[index]) != entry.rank:
            problems.append(self._make(f"segment {index + 1} has the random numbers of another example"))
        if not np.allclose(self._positions[places], positions, rtol=1e-5, atol=1e-5):
            wrong = int(np.abs(self._positions[places] - positions).max(axis=0).argmax())
            actual = self._positions[places][:, wrong]
            problems.append(
                self._make(
                    f"the positions of {name} along {'thw'[wrong]} run from {actual.min():g} to {actual.max():g}, not "
                    f"from 0 to {positions[:, wrong].max():g}"
                )
            )
        try:
            values = None if latents is None else latents[entry.example]
        except DecodeError:
            return [self._make(f"{name} is damaged, but counts in the loss")] if self._valid[index] else problems
        if not self._valid[index]:
            return problems  # a clip or a caption is damaged
        if values is not None:
            expected = _cut_patches(values, self._subject.model.backbone.patch)
            if not np.allclose(self._tokens[places], expected, atol=1e-5):
                problems.append(self._make(f"the tokens of {name} are not the patches of its latents"))
        elif not np.any(self._tokens[places]):
            problems.append(self._make(f"the tokens of {name} are all 0"))
        return problems + self._check_text(index, entry, name)

    def _check_text(self, index: int, entry: Entry, name: str) -> list[Problem]:
        """Check that the text is one of the clip's captions in the table of the clips."""
        places = np.flatnonzero(self._text_segments == index + 1)
        text_encoder = self._subject.text_encoder
        if not len(places):
            return [Problem("captions", f"{name} has no text, not even that of an empty caption")]
        number = self._get_clip(entry.example)
        captions = self._subject.clips.infos[number].captions or ("",)
        if not isinstance(text_encoder, FrozenTextEncoder):
            expected = [np.asarray(text_encoder(caption)) for caption in captions]
        elif self._subject.latents is not None:  # `check_text_embeddings` compares them with the encoder
            own = self._subject.latents.all_captions[entry.example]
            if own and not set(own) <= set(captions):
                return [Problem("captions", f"{name} has the caption {own[0]!r}, its clip {captions[0]!r}")]
            expected = [self._subject.latents.read_text(entry.example, number) for number in range(len(own))]
        else:
            return []
        values = self._text[places]
        if any(each.shape == values.shape and np.allclose(values, each, atol=1e-5) for each in expected):
            return []
        return [Problem("captions", f"{name} has another text than its caption {captions[0]!r}")]

    def _get_clip(self, example: int) -> int:
        return self._subject.find_clip(example)

    def _get_name(self, example: int) -> str:
        latents = self._subject.latents
        return self._subject.clips.infos[example].name if latents is None else latents.names[example]

    def _make_positions(self, example: int) -> Float[np.ndarray, "n 3"]:
        """Return the positions of a clip's tokens: counts, or in time seconds at the rate of its frames."""
        model, limits, latents = self._subject.model, self._subject.run.limits, self._subject.latents
        backbone, stride = model.backbone, model.autoencoder.stride
        info = self._subject.clips.infos[self._get_clip(example)]
        if latents is None:
            size = fit_size(info, limits)
            sizes = 1 + (size.t - 1) // stride.t, size.h // stride.h, size.w // stride.w
        else:
            sizes = latents.get_size(example)
        counts = [size // patch for size, patch in zip(sizes, backbone.patch, strict=True)]
        t, h, w = np.indices(counts).reshape(3, -1).astype(np.float64)
        if backbone.time_coordinate != "tokens":
            rate = info.fps if limits.fps is None else min(info.fps, limits.fps)
            frames = stride.t * backbone.patch.t
            # The first token stands for one frame; others may count from the first of theirs.
            lead = (frames - 1) / frames if backbone.time_coordinate == "frame seconds" else 0.0
            t = np.maximum(t - lead, 0) * frames / rate
        return np.stack([t, h, w], axis=-1)

    def _make(self, message: str) -> Problem:
        return Problem("rows", f"row {self._number}: {message}")


def _cut_patches(latents: Float[np.ndarray, "t h w c"], patch: Sequence[int]) -> Float[np.ndarray, "n p"]:
    """Return the patches of latents, one after the other."""
    (t, h, w, _), (pt, ph, pw) = latents.shape, patch
    patches = [
        latents[i : i + pt, j : j + ph, k : k + pw].reshape(-1)
        for i in range(0, t, pt)
        for j in range(0, h, ph)
        for k in range(0, w, pw)
    ]
    return np.stack(patches)


def check_order(planner: RowPlanner | BucketPlanner) -> list[Problem]:
    """Check that an epoch has each example once, in a random order, and the next one other rows."""
    count = len(planner.table)
    if not isinstance(planner, RowPlanner) or not _MIN_ORDERED <= count <= _MAX_EXAMPLES:
        return []
    problems, plans = [], [planner.get_epoch(epoch) for epoch in (0, 1)]
    for epoch, plan in enumerate(plans):
        order = plan.order
        if abs(correlation := np.corrcoef(order, np.arange(len(order)))[0, 1]) > _MAX_CORRELATION:
            problems.append(f"epoch {epoch} is in the order of the data set (correlation {correlation:.2f})")
        used = len(np.unique(order))
        if planner.sampler is None and used < len(order):
            problems.append(f"epoch {epoch} has {len(order) - used} examples more than once")
        if planner.sampler is None and used + len(plan.dropped_examples) < count:
            problems.append(f"epoch {epoch} leaves out {count - used} of {count} examples")
    first, second = ({frozenset(row) for row in plan.rows if len(row) > 1} for plan in plans)
    if len(first) >= _MIN_ROWS and len(first & second) > _MAX_EQUAL_ROWS * len(first):
        problems.append(f"{len(first & second)} of {len(first)} rows with several examples are those of the next epoch")
    return [Problem("order", each) for each in problems]


def check_repetition(previous: PackedBatch, rows: PackedBatch, step: int) -> list[Problem]:
    """Check that a batch is not the one before, unless there are as few clips."""
    if np.array_equal(previous.examples, rows.examples) and np.array_equal(previous.tokens, rows.tokens):
        return [Problem("order", f"the batches of steps {step - 1} and {step} are the same")]
    return []
