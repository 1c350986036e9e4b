"""Known pixels as a model gets them in training and in sampling: the same mask and latents."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from dit_video.data.examples import Entry
from dit_video.data.latents.codec import LatentCodec
from dit_video.data.latents.online import OnlineEncoder
from dit_video.data.packing.mask_mix import MaskMix
from dit_video.data.packing.plan import RowPlanner
from dit_video.data.sources import ClipExamples, DecodedClip, OnlineEncoding
from dit_video.models.conditioning import (
    Beginning,
    BothEnds,
    Ending,
    FirstAndLastFrame,
    FirstFrame,
    FrameConditioning,
    InsideOfBox,
    Keyframes,
    LastFrame,
    OutsideOfBox,
    interleave_mask,
)
from dit_video.sampling.completion import Completion
from dit_video.sampling.plan import CLEAN_LATENTS, CLEAN_MASK
from dit_video.sampling.request import ModelParts, Request
from dit_video.tokens import Grid, PackedShape, compute_token_grid, pack, patchify, unpack
from dit_video.video import Clip
from support import tiny
from support.example_tables import make_table
from support.offline_clips import MemorySource
from support.random_params import make_random_params

AUTOENCODER = tiny.EXPERIMENT.get_model().autoencoder
PARAMS = make_random_params(AUTOENCODER.make)
SIZES = (Grid(1, 16, 32), Grid(9, 32, 16))
MASKS = (
    FirstFrame(),
    LastFrame(),
    FirstAndLastFrame(),
    Beginning(),
    Ending(),
    BothEnds(),
    Keyframes(),
    OutsideOfBox(),
    InsideOfBox(),
)
CONDITIONING = FrameConditioning(prob=0.9, rest="grey", masks=MASKS)
MIX = MaskMix(CONDITIONING, 5, AUTOENCODER.channels, AUTOENCODER.stride)


def make_clip(number):
    size = SIZES[number % len(SIZES)]
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def make_training_rows(patch, count):
    """Return the rows of as many clips, as training reads them, with the running numbers of these clips."""
    clips = [make_clip(number) for number in range(count)]
    sizes = [Grid(*clip.shape[:3]) for clip in clips]
    stride = AUTOENCODER.stride
    grids = [
        compute_token_grid(Grid(1 + (size.t - 1) // stride.t, size.h // stride.h, size.w // stride.w), patch)
        for size in sizes
    ]
    table, shape = make_table(grids, [1] * count), PackedShape(tokens=24, text=64, segments=4)
    encoding = OnlineEncoding(
        encode=OnlineEncoder(AUTOENCODER, PARAMS, sizes),
        limits=tiny.EXPERIMENT.limits,
        stride=stride,
        channels=AUTOENCODER.channels,
        patch=patch,
        mask_mix=MIX,
    )
    planner, source = RowPlanner(table, shape, seed=0), ClipExamples(MemorySource([], None), table, encoding)
    rows, packed = [], []
    while sum(len(entries) for entries in rows) < count:
        rows.append(planner.get_entries(len(rows)))
        examples = source.encode([(entry, DecodedClip(clips[entry.example], 0)) for entry in rows[-1]])
        packed.append(pack(examples, shape, width=source.width, fields=source.fields))
    return rows, packed


def make_model(**changes):
    backbone = dataclasses.replace(tiny.EXPERIMENT.get_model().backbone, **changes)
    return ModelParts(
        backbone=backbone,
        codec=LatentCodec(AUTOENCODER, PARAMS),
        frame_conditioning=CONDITIONING,
        image_encoder_folder=None,
        token_dt=1.0,
        token_lead=0.0,
    )


def plan_fields(model, entry: Entry):
    """Return the fields of a request with the mask of an example of training, by name."""
    frames = make_clip(entry.example)
    size = Grid(*frames.shape[:3])
    is_known = MIX.draw_known(size, entry.rank)
    known = {"video": Clip(frames, 8), "generated": ~is_known, "method": "trained"} if is_known.any() else {}
    plan = Completion()(Request("", size, **known), model)
    assert plan.method == ("trained" if is_known.any() else "")
    return {field.name: values for field, values in plan.fields.items()}


def test_a_model_with_mask_channels_reads_in_sampling_what_it_was_trained_with():
    stride, channels = AUTOENCODER.stride, AUTOENCODER.channels
    model = make_model(cond_channels=stride.t + channels)
    patch = model.backbone.patch
    rows, batches = make_training_rows(patch, 20)
    kinds = set()
    for row, batch in zip(rows, batches, strict=True):
        volume = patch.volume
        trained = interleave_mask(
            jnp.asarray(batch.fields["cond_mask"])[None],
            jnp.asarray(batch.fields["cond_latents"])[None],
            patch_volume=volume,
        )
        for entry, values in zip(row, unpack(np.asarray(trained)[0], batch.segments), strict=True):
            sampled = plan_fields(model, entry)["cond_latents"]
            np.testing.assert_allclose(patchify(sampled, patch), values, atol=2e-4)
            kinds.add(CONDITIONING.draw_kind(5, entry.rank))
    assert len(kinds) > 4


def test_a_model_with_clean_tokens_gets_in_sampling_what_it_was_trained_with():
    model = make_model(time="token")
    patch = model.backbone.patch
    rows, batches = make_training_rows(patch, 20)
    compared = 0
    for row, batch in zip(rows, batches, strict=True):
        masks = unpack(np.asarray(batch.fields["cond_mask"]), batch.segments)
        latents = unpack(np.asarray(batch.fields["cond_latents"]), batch.segments)
        for entry, mask, values in zip(row, masks, latents, strict=True):
            is_clean = mask.min(axis=-1) == 1
            fields = plan_fields(model, entry)
            if CLEAN_MASK not in fields:
                assert not is_clean.any()
                continue
            np.testing.assert_array_equal(patchify(fields[CLEAN_MASK], patch).min(axis=-1) > 0, is_clean)
            np.testing.assert_allclose(patchify(fields[CLEAN_LATENTS], patch)[is_clean], values[is_clean], atol=2e-4)
            compared += int(is_clean.sum())
    assert compared > 10


def test_known_latents_of_a_task_mix_are_also_held_where_they_do_not_depend_on_unknown_pixels():
    model = make_model(cond_channels=AUTOENCODER.stride.t + AUTOENCODER.channels)
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    clip, size = Clip(frames, 8), Grid(9, 32, 32)
    beginning = {"video": clip, "generated": np.arange(9) >= 5}
    auto, trained = (Completion()(Request("", size, method=each, **beginning), model) for each in ("auto", "trained"))
    assert (auto.method, trained.method) == ("trained and training_free", "trained")
    names = {field.name: values for field, values in auto.fields.items()}
    held = names["held_strength"][..., 0] == 1
    np.testing.assert_array_equal(held.all(axis=(1, 2)), [True, True, False])  # the autoencoder is causal
    encoded = model.codec.encode_pixels(frames)
    np.testing.assert_allclose(names["held_latents"][held], encoded[held], atol=1e-4)
    assert auto.update is None
    ending = Completion()(Request("", size, video=clip, generated=np.arange(9) < 5), model)
    held = next(values for field, values in ending.fields.items() if field.name == "held_strength")
    assert not held[:2].any()  # of the last one, pixels depend on the unknown ones before it
    np.testing.assert_array_equal(
        (ending.update.is_replaced | (held[..., 0] > 0)).all(axis=(1, 2)), [False, False, True]
    )
