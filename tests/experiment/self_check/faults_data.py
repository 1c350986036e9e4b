"""Silent faults of data on disk, and of what is read from it: latents, clips, captions and their embeddings."""

import functools
import shutil
from dataclasses import replace

import jax
import numpy as np
import pyarrow.compute as pc
from experiment.self_check.faults_injection import (
    Catalogue,
    copy_data,
    encode_again,
    get_sources,
    map_latents,
    permute_latents,
    replace_function,
    rewrite_latents,
)
from pyarrow import parquet

from dit_video.core import pixels
from dit_video.data import captions as caption_sources
from dit_video.data import sizes
from dit_video.data.clips import ClipSource
from dit_video.data.ingest.engine import ingest
from dit_video.data.latents import offline
from dit_video.data.latents.online import CanvasEncoder
from dit_video.data.sizes import compute_all_sampled_fps
from dit_video.data.tables import INDEX_FOLDER
from dit_video.experiment import Experiment
from dit_video.video import decode
from dit_video.weights import load
from dit_video.weights.frozen_encoders import FrozenTextEncoder

FAULTS = Catalogue("data")


@FAULTS.add("The latents of two clips of one size are exchanged in the cache.", "latents")
def latents_swapped(run):
    def change(examples):
        pairs = ((i, j) for j in range(len(examples)) for i in range(j))
        i, j = next(
            (i, j)
            for i, j in pairs
            if examples[i].latents.shape == examples[j].latents.shape and examples[i].captions != examples[j].captions
        )
        examples[i], examples[j] = (
            examples[i]._replace(latents=examples[j].latents),
            examples[j]._replace(latents=examples[i].latents),
        )
        return examples

    rewrite_latents(run, change)


@FAULTS.add("Latents are written under the name of the next clip: an index that is off by one.", "latents")
def latents_shifted(run):
    permute_latents(run, lambda count: np.roll(np.arange(count), 1))


@FAULTS.add("Each clip of a size has the latents of the first one: a buffer is reused.", "latents")
def latents_of_first_clip(run):
    permute_latents(run, lambda count: [0] * count)


@FAULTS.add(
    "The autoencoder was trained further after the encoding, and the identity was not updated "
    "(a cache that is not invalidated: ostris/ai-toolkit, kohya-ss/musubi-tuner).",
    "latents",
)
def latents_stale(run):
    def perturb(leaf):
        return leaf * (1 + 0.1 * np.random.default_rng(0).standard_normal(leaf.shape, np.float32))

    def make_encoder(autoencoder, params, **options):
        return CanvasEncoder(autoencoder, jax.tree.map(perturb, params), **options)

    encode_again(run, (offline, "CanvasEncoder", make_encoder))


def _read_normalizer(run):
    params = load(run.folder / "autoencoder" / "weights.safetensors")["normalizer"]
    return np.asarray(params["mean"]), np.asarray(params["std"])


@FAULTS.add(
    "Latents are cached in the autoencoder's own scale: normalisation was left to the training, which does not do it.",
    *("latents", "latent_statistics"),
)
def latents_not_normalised(run):
    mean, std = _read_normalizer(run)
    map_latents(run, lambda latents: latents * std + mean)


@FAULTS.add(
    "Latents are normalised by the cache and again by the training.",
    *("latents", "latent_statistics"),
)
def latents_normalised_twice(run):
    mean, std = _read_normalizer(run)
    map_latents(run, lambda latents: (latents - mean) / std)


@FAULTS.add("Channels of the latents are in the reverse order.", "latents")
def latent_channels_reversed(run):
    map_latents(run, lambda latents: np.ascontiguousarray(latents[..., ::-1]))


@FAULTS.add("Height and width are exchanged, which only clips that are not square show by their shape.", "latents")
def square_latents_transposed(run):
    def change(latents):
        is_square = latents.shape[1] == latents.shape[2]
        return np.ascontiguousarray(latents.transpose(0, 2, 1, 3)) if is_square else latents

    map_latents(run, change)


@FAULTS.add("Frames of the latents are in the reverse order.", "latents")
def latents_reversed_in_time(run):
    map_latents(run, lambda latents: np.ascontiguousarray(latents[::-1]))


@FAULTS.add("Latents are those of mirrored clips, whose captions say left and right.", "latents")
def latents_mirrored(run):
    map_latents(run, lambda latents: np.ascontiguousarray(latents[:, :, ::-1]))


def _read_changed(change):
    """Return `read_fitted_clip` with changed frames."""
    read = sizes.read_fitted_clip

    def read_changed(*arguments, **options):
        clip = read(*arguments, **options)
        return replace(clip, frames=np.ascontiguousarray(change(clip.frames)))

    return read_changed


@FAULTS.add("The script that encoded the latents read frames as BGR (OpenCV).", "latents")
def latents_of_bgr(run):
    encode_again(run, (offline, "read_fitted_clip", _read_changed(lambda frames: frames[..., ::-1])))


@FAULTS.add(
    "The script that encoded the latents scaled pixels to 0 … 1 instead of -1 … 1.", *("latents", "latent_statistics")
)
def latents_of_unit_range(run):
    encode_again(run, (pixels, "to_float", lambda frames: frames.astype(np.float32) * np.float32(1 / 255)))


@FAULTS.add(
    "All frames are read as BGR, at each use of a clip.",
    "frames",
    variant="online",
)
def frames_bgr(run):
    def decode_bgr(*arguments, **options):
        clip = decode(*arguments, **options)
        return replace(clip, frames=np.ascontiguousarray(clip.frames[..., ::-1]))

    replace_function(decode, decode_bgr)


@FAULTS.add(
    "Pixels are scaled to 0 … 1 before they are encoded, at each use of a clip.",
    *("latents", "latent_statistics", "frames"),
    variant="online",
)
def pixels_of_unit_range(run):
    replace_function(pixels.to_float, lambda frames: frames.astype(np.float32) * np.float32(1 / 255))


@FAULTS.add(
    "Frames are taken one after the other instead of at the declared rate: clips of 12 fps are too slow "
    "(Lightricks/LTX-2 #71).",
    "frames",
    variant="seconds",
)
def frame_rate_ignored(run):
    replace_function(decode, lambda source, *, fps=None, **options: decode(source, **options))
    encode_again(run)


@FAULTS.add(
    "The data set states twice the rate of its clips, as some containers do: each frame is seen twice.",
    "frames",
)
def frame_rate_doubled(run):
    data = copy_data(run)
    for path in (data / INDEX_FOLDER).glob("*.parquet"):
        table = parquet.read_table(path)
        number = table.schema.get_field_index("fps")
        parquet.write_table(table.set_column(number, "fps", pc.multiply(table["fps"], 2.0)), path)
    encode_again(run)


@FAULTS.add(
    "The first frame of each clip is cut off (a decoder that drops it after a seek).", "frames", variant="online"
)
def first_frames_cut(run):
    def decode_late(*arguments, **options):
        clip = decode(*arguments, **options)
        return replace(clip, frames=np.concatenate([clip.frames[1:], clip.frames[-1:]]))

    replace_function(decode, decode_late)


@FAULTS.add(
    "Seconds between tokens follow from the clip's own rate instead of the one it is sampled at.",
    *("rows", "positions"),
    variant="seconds",
)
def seconds_of_native_rate(run):
    replace_function(compute_all_sampled_fps, lambda source, limits: source.column("fps").astype(np.float64))


@FAULTS.add("Captions are read in another order than clips: each clip has that of the next one.", "captions")
def captions_shifted(run):
    number = caption_sources.number_captions

    def number_shifted(captions):
        captions = list(captions)
        return number(captions[1:] + captions[:1])

    replace_function(number, number_shifted)


@FAULTS.add(
    "The captions of one of two data sets are those of its other clips.",
    "captions",
    variant="two data sets",
)
def captions_of_one_data_set_mixed(run):
    number, first = caption_sources.number_captions, run.clips.dataset_sizes[0]

    def number_mixed(captions):
        captions = list(captions)
        return number(captions[:first] + captions[first:][::-1])

    replace_function(number, number_mixed)


@FAULTS.add("Captions are cut to their first words by a limit of the tokenizer that nobody set.", "captions")
def captions_cut(run):
    init = caption_sources.TokenizedCaptions.__init__

    @functools.wraps(init)
    def init_cut(self, captions, tokenize, **options):
        init(self, captions, lambda text: tokenize(text)[:12], **options)

    caption_sources.TokenizedCaptions.__init__ = init_cut


@FAULTS.add(
    "Cached embeddings are those of another version of the text encoder.", "text_embeddings", variant="frozen text"
)
def text_embeddings_stale(run):
    embed = FrozenTextEncoder.__call__
    noise = np.random.default_rng(0)

    def embed_otherwise(self, text):
        values = embed(self, text)
        return values + 0.3 * values.std() * noise.standard_normal(values.shape, np.float32)

    encode_again(run, (FrozenTextEncoder, "__call__", embed_otherwise))


@FAULTS.add("Held-out clips are trained on: the filter by name is lost.", "held_out")
def held_out_clips_trained(run):
    ClipSource.exclude = lambda self, names: self
    encode_again(run)


@FAULTS.add("Held-out clips are in the training set under other names, too, with the same bytes.", "held_out")
def held_out_clips_copied(run):
    data, clips = run.folder / "data", run.folder / "clips"
    shutil.copytree(get_sources(run).clips, clips)
    experiment: Experiment = run.experiment
    with open(clips / "metadata.csv", "a") as table:
        for name in experiment.data.held_out:
            copy = name.replace("clips/", "clips/copy-of-")
            shutil.copy(clips / name, clips / copy)
            caption = next(line for line in (clips / "metadata.csv").read_text().splitlines() if line.startswith(name))
            table.write(f"{copy},{caption.partition(',')[2]}\n")
    data.unlink()
    ingest(clips, data, is_fixed=True)
    encode_again(run)
