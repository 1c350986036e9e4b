"""Offline encoding: its views, the number of its programs, and latents equal to those of each view alone."""

import dataclasses
import json
import signal
import subprocess
import sys
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core import pixels, rng
from dit_video.core.errors import MissingError, UserError
from dit_video.data.latents.cache import LatentExample, LatentSource
from dit_video.data.latents.offline import encode_latents, finish_latents, measure_latent_moments
from dit_video.data.latents.plan import Augmentations, list_views, plan_encoding
from dit_video.data.sizes import read_fitted_clip
from dit_video.distributed.faults.progress import PROGRESS
from dit_video.models.conditioning import ClipConditioning, Ending, InsideOfBox, fold_mask
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.nn import get_graph_def, init_params
from dit_video.tokens import Field, Grid
from support.devices import HANG, PROGRAMS, make_environment
from support.marks import mark_slow_except
from support.offline_clips import LIMITS, MIXED_SIZES, MODEL, PARAMS, make_encoding, make_source
from support.random_params import make_random_params


def encode_views(folder, source, encoding):
    """Encode all views, and return the cached latents of those that could be read, by name."""
    encode_latents(folder, source, encoding, plan_encoding(source, encoding), identity="a")
    latents = LatentSource(folder)
    return {
        name: LatentExample(name, latents.all_captions[index], latents[index], latents.clips[index])
        for index, name in enumerate(latents.names)
    }


def encode_alone(source, view):
    """Return the latents of a view at its native size, encoded by itself."""
    frames = read_fitted_clip(source, view.clip, view.limits, start=view.start).frames
    frames = frames[:, :, ::-1] if view.flipped else frames
    return np.asarray(_encode_frames(pixels.to_float(frames)[None]))[0]


@jax.jit
def _encode_frames(frames):
    return nnx.merge(get_graph_def(MODEL.make), PARAMS).encode(frames)


def test_stretches_resolutions_and_flips_are_views_with_names_of_their_own():
    source = make_source([Grid(1, 16, 16), Grid(9, 32, 32)])
    plain = list_views(source.infos, LIMITS, Augmentations(clips_per_video=3))
    assert [view.name for view in plain] == ["0.png@0", "1.apng@0", "1.apng@2", "1.apng@4"]
    all_of = list_views(source.infos, LIMITS, Augmentations(resolutions=(16 * 16,), flips=True))
    assert [(view.name, view.size) for view in all_of] == [
        ("0.png@0", Grid(1, 16, 16)),  # its smaller resolution is the same
        ("0.png@0~flipped", Grid(1, 16, 16)),
        ("1.apng@0", Grid(5, 32, 32)),
        ("1.apng@0~flipped", Grid(5, 32, 32)),
        ("1.apng@0~16x16", Grid(5, 16, 16)),
        ("1.apng@0~16x16~flipped", Grid(5, 16, 16)),
    ]
    for wrong in ({"clips_per_video": 0}, {"resolutions": (0,)}):
        with pytest.raises(UserError, match="must be at least 1"):
            Augmentations(**wrong)
    for wrong in ({"views_per_file": 0}, {"threads": 0}):
        with pytest.raises(UserError, match="must be at least 1"):
            make_encoding(**wrong)
    with pytest.raises(UserError, match="no clips"):
        plan_encoding(make_source([]), make_encoding())


@pytest.mark.parametrize("canvas_pixels", mark_slow_except([20_000], [1, 20_000, 1 << 23]))
def test_every_view_is_encoded_as_it_would_be_alone(canvas_pixels, tmp_path):
    source = make_source(MIXED_SIZES)
    encoding = make_encoding(
        canvas_pixels=canvas_pixels, augmentations=Augmentations(clips_per_video=2, resolutions=(300,), flips=True)
    )
    plan = plan_encoding(source, encoding)
    assert plan.num_canvas_sizes <= 8
    examples = encode_views(tmp_path / "l", source, encoding)
    assert len(examples) == len(plan.views) > 3 * len(MIXED_SIZES)
    for view in plan.views[::7]:
        example = examples[view.name]
        np.testing.assert_allclose(example.latents, encode_alone(source, view), atol=1e-5)
        assert example.clip == source.infos[view.clip].name
        assert example.captions == ("one", "two, from the left")


class Prefixes(NamedTuple):
    values: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLatents(ClipConditioning):
    """Latents of clips of which no frame, and of which the first is kept, next to each other."""

    record = Prefixes
    encoded_prefixes = (0, 1)

    @property
    def field(self):
        return Field(name="prefixes", alignment="grid", shape=(2 * MODEL.channels,))

    def from_clip(self, view):
        return np.concatenate([view.encoded[0], view.encoded[1]], axis=-1)

    def from_request(self, value, latents):
        return value


def test_conditioning_gets_latents_of_clips_of_which_the_first_frames_are_kept(tmp_path):
    source = make_source(MIXED_SIZES[::3])
    encoding = make_encoding(conditioning=(PrefixLatents(),), cond_latents=True)
    plan = plan_encoding(source, encoding)
    encode_latents(tmp_path / "l", source, encoding, plan, identity="a")
    latents = LatentSource(tmp_path / "l")
    assert [field.name for field in latents.fields] == ["cond_latents", "prefixes"]
    for index, name in enumerate(latents.names):
        view = next(view for view in plan.views if view.name == name)
        frames = pixels.to_float(read_fitted_clip(source, view.clip, view.limits, start=view.start).frames)
        numbers = np.arange(len(frames))[:, None, None, None]
        grey, first = (np.asarray(_encode_frames(np.where(numbers < count, frames, 0)[None]))[0] for count in (0, 1))
        fields = latents.read_example(index)[1]
        np.testing.assert_allclose(fields["prefixes"], np.concatenate([grey, first], -1), atol=1e-5)
        np.testing.assert_allclose(fields["cond_latents"], first, atol=1e-5)


@pytest.mark.slow
def test_500_native_sizes_compile_at_most_8_programs(tmp_path):
    sizes = [Grid(1 if (h + w) % 3 else 3, 4 * h, 4 * w) for h in range(1, 26) for w in range(1, 21)]
    source, encoding = make_source(sizes), make_encoding(limits=dataclasses.replace(LIMITS, max_pixels=10**6))
    assert len(set(sizes)) == 500
    plan = plan_encoding(source, encoding)
    assert {view.size for view in plan.views} == set(sizes)
    compiled = []

    def listen(event, _seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        examples = encode_views(tmp_path / "l", source, encoding)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert 1 <= len(compiled) <= plan.num_canvas_sizes <= 8
    assert len(examples) == 500
    assert plan.padding_share < 0.15
    draw = np.random.default_rng(0)
    for number in draw.choice(500, 5, replace=False):
        np.testing.assert_allclose(
            examples[plan.views[number].name].latents, encode_alone(source, plan.views[number]), atol=1e-5
        )


def test_files_of_several_processes_are_one_data_set(tmp_path):
    source, encoding = make_source(MIXED_SIZES), make_encoding(views_per_file=3)
    plan = plan_encoding(source, encoding)
    assert len(plan.files) >= 4
    done = []
    for shard in (1, 0, 2):
        arguments = {"identity": {"autoencoder": "a"}, "shard": shard, "shards": 3}
        finished = encode_latents(tmp_path / "l", source, encoding, plan, progress=done.append, **arguments)
        assert finished == (shard == 2)
        if not finished:
            assert not finish_latents(tmp_path / "l", source, encoding, plan, identity={"autoencoder": "a"})
            with pytest.raises(UserError, match=r"not finished, \d of \d files"):
                LatentSource(tmp_path / "l")
        assert done[-1] == sum(plan.count_views(file) for file in range(shard, len(plan.files), 3))
    latents = LatentSource(tmp_path / "l", identity={"autoencoder": "a"})
    assert len(latents) == len(MIXED_SIZES)
    assert sorted(latents.clips) == sorted(info.name for info in source.infos)
    for index in range(0, len(latents), 2):
        view = next(view for view in plan.views if view.name == latents.names[index])
        np.testing.assert_allclose(latents[index], encode_alone(source, view), atol=1e-5)
    # One process makes the same files, byte by byte; and what is there is not made again.
    encode_latents(tmp_path / "m", source, encoding, plan, identity={"autoencoder": "a"})
    assert read_contents(tmp_path / "m") == read_contents(tmp_path / "l")
    source.contents = None
    assert encode_latents(tmp_path / "m", source, encoding, plan, identity={"autoencoder": "a"})
    with pytest.raises(UserError, match="holds latents of autoencoder a, but b was requested"):
        encode_latents(tmp_path / "m", source, encoding, plan, identity={"autoencoder": "b"})
    # Once all is there, nothing is left to encode, whatever the number of views in a file; before, it may not change.
    other = dataclasses.replace(encoding, views_per_file=8)
    rest = plan_encoding(source, other, tmp_path / "m")
    assert (rest.views, rest.files, rest.padding_share) == ((), (), 0)
    assert encode_latents(tmp_path / "m", source, other, rest, identity={"autoencoder": "a"})
    assert read_contents(tmp_path / "m") == read_contents(tmp_path / "l")
    (tmp_path / "m" / "index" / "train-00001.parquet").unlink()
    with pytest.raises(UserError, match="other options"):
        encode_latents(tmp_path / "m", source, other, plan_encoding(source, other), identity={"autoencoder": "a"})
    with pytest.raises(UserError, match=r"shard=2 must be one of 0 to 1"):
        encode_latents(tmp_path / "m", source, encoding, plan, identity={"autoencoder": "a"}, shard=2, shards=2)


def test_what_is_encoded_counts_as_progress(tmp_path):
    """A run of several processes in which no clip is encoded for long counts as hung."""
    seen = []
    source, encoding = make_source(MIXED_SIZES[:5]), make_encoding(views_per_file=3)
    plan = plan_encoding(source, encoding)
    before = PROGRESS.changes
    arguments = {"identity": "a", "progress": lambda _: seen.append((PROGRESS.changes, len(PROGRESS.works)))}
    encode_latents(tmp_path / "l", source, encoding, plan, **arguments)
    changes, works = zip(*seen, strict=True)
    assert len(seen) >= 5
    assert list(changes) == sorted(set(changes))
    assert changes[-1] - before >= 2 * 5  # Each clip is decoded, and encoded.
    assert set(works) == {1}
    assert not PROGRESS.works


def read_contents(folder):
    """Return the bytes of all files, by their paths in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_clip_that_is_damaged_is_left_out_with_its_reason(tmp_path):
    source, encoding = make_source(MIXED_SIZES), make_encoding()
    whole = encode_views(tmp_path / "whole", source, encoding)
    source.contents[2] = b"no clip"
    source.contents[7] = source.contents[0]  # of fewer frames than the index says
    plan = plan_encoding(source, encoding)
    for name, example in encode_views(tmp_path / "l", source, encoding).items():
        np.testing.assert_array_equal(example.latents, whole[name].latents)
    latents = LatentSource(tmp_path / "l")
    assert len(latents) == len(MIXED_SIZES) - 2
    assert {one.name for one in latents.skipped} == {"2.png@0", "7.apng@0"}
    assert any("not a readable video or image" in one.reason for one in latents.skipped)

    source.contents = [b""] * len(MIXED_SIZES)
    with pytest.raises(UserError, match=f"{len(MIXED_SIZES)} clips could not be read"):
        encode_latents(tmp_path / "m", source, encoding, plan, identity="a")
    # A data set that can't be opened is no fault of its clips.
    source.contents = None
    with pytest.raises(MissingError):
        encode_latents(tmp_path / "n", source, encoding, plan, identity="a")


def test_texts_are_embedded_once_with_their_real_tokens_only(tmp_path):
    config = ByteEncoderConfig(width=8, layers=1, heads=2, max_tokens=64)
    tokenizer, params = config.make_tokenizer(), make_random_params(config.make)
    encoder = jax.jit(lambda ids: nnx.merge(get_graph_def(config.make), params)(ids, jnp.ones_like(ids)).values)
    embedded = []

    def encode_text(caption):
        embedded.append(caption)
        ids = jnp.asarray(tokenizer(caption))[None]
        return np.asarray(encoder(ids))[0]

    source = make_source(MIXED_SIZES[:5])
    source.infos = (source.infos[0]._replace(captions=()), *source.infos[1:])
    encoding = make_encoding(encode_text=encode_text, storage="bfloat16")
    plan = plan_encoding(source, encoding)
    with pytest.raises(UserError, match="part text"):
        encode_latents(tmp_path / "l", source, encoding, plan, identity={"autoencoder": "a"})
    encode_latents(tmp_path / "l", source, encoding, plan, identity={"autoencoder": "a", "text": "t"})
    assert sorted(embedded) == ["", "one", "two, from the left"]
    latents = LatentSource(tmp_path / "l", identity={"autoencoder": "a", "text": "t"})
    assert latents.text_width == 8
    assert latents.caption_counts.tolist() == list(map(len, latents.all_captions))
    lengths = iter(latents.text_lengths.tolist())
    for index, captions in enumerate(latents.all_captions):
        for number, caption in enumerate(captions):
            expected = encode_text(caption)
            assert len(expected) == next(lengths) == len(tokenizer(caption)) // 4
            np.testing.assert_allclose(latents.read_text(index, number), expected, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(latents.empty_text, encode_text(""), rtol=1e-2, atol=1e-2)
    assert latents.all_captions[latents.names.index("0.png@0")] == ()
    with pytest.raises(UserError, match="0 embedded captions"):
        latents.read_text(latents.names.index("0.png@0"))
    with pytest.raises(UserError, match="holds latents of text t, but u was requested"):
        LatentSource(tmp_path / "l", identity={"autoencoder": "a", "text": "u"})
    assert LatentSource(tmp_path / "l", identity={"autoencoder": "a"}).hash == latents.hash


def start_encoding(folder, last=-1, **environment):
    """Start to encode in another process, which waits when `last` clips are done."""
    command = [sys.executable, str(PROGRAMS / "offline_encoding.py"), str(folder), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=make_environment(1) | environment)


def test_a_killed_process_continues_where_it_was(tmp_path):
    source, encoding = make_source(MIXED_SIZES), make_encoding(views_per_file=3)
    plan = plan_encoding(source, encoding)
    held = plan.count_views(0) + 2  # in the middle of the second file
    killed = start_encoding(tmp_path / "l", held)
    assert any(int(line) == held for line in killed.stdout)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    made = read_contents(tmp_path / "l")
    assert [name for name in made if name.startswith("index/")] == ["index/train-00000.parquet"]
    before = {name: (tmp_path / "l" / name).stat().st_mtime_ns for name in made if "00000" in name}
    assert encode_latents(tmp_path / "l", source, encoding, plan, identity="a")
    first = {place.clip for canvas in plan.files[0] for place in plan.canvases[canvas].slots}
    assert set(source.read) == set(range(len(MIXED_SIZES))) - first
    assert {name: (tmp_path / "l" / name).stat().st_mtime_ns for name in before} == before
    encode_latents(tmp_path / "m", source, encoding, plan, identity="a")
    assert read_contents(tmp_path / "l") == read_contents(tmp_path / "m")  # and nothing half-written is left


@pytest.mark.slow
def test_batches_are_split_over_the_devices_of_a_process(tmp_path):
    run = start_encoding(tmp_path / "l", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    output, _ = run.communicate(timeout=HANG)
    assert run.returncode == 0
    assert output.splitlines()[-1] == "devices 8"
    source, encoding = make_source(MIXED_SIZES), make_encoding()
    one = {name: example.latents for name, example in encode_views(tmp_path / "one", source, encoding).items()}
    latents = LatentSource(tmp_path / "l")
    assert sorted(latents.names) == sorted(one)
    for index, name in enumerate(latents.names):
        np.testing.assert_allclose(latents[index], one[name], atol=1e-5)
    assert json.loads((tmp_path / "l" / "dataset_info.json").read_text())["splits"][0]["shardLengths"]


@pytest.fixture
def autoencoder(tiny):
    make = tiny.EXPERIMENT.get_model().autoencoder.make
    return get_graph_def(make), jax.jit(init_params, static_argnums=0)(make, rng.key(0, "autoencoder"))


@pytest.mark.slow
def test_moments_are_those_of_all_positions(autoencoder):
    generator = np.random.default_rng(0)
    batches = [generator.integers(0, 256, (4, frames, 16, 16, 3), np.uint8) for frames in (5, 9, 1)]
    graph, params = autoencoder
    mean, std = measure_latent_moments(graph, params, batches)
    model = nnx.merge(graph, params)
    latents = np.concatenate(
        [
            np.asarray(model.posterior(pixels.to_float(jnp.asarray(batch))).mean).reshape(-1, len(mean))
            for batch in batches
        ]
    )
    np.testing.assert_allclose(mean, latents.mean(0), atol=1e-5)
    np.testing.assert_allclose(std, latents.std(0), rtol=1e-4)


def test_a_channel_without_variance_is_no_division_by_zero(autoencoder):
    graph, params = autoencoder
    params["linear"]["down"]["kernel"] = jnp.zeros_like(params["linear"]["down"]["kernel"])
    _mean, std = measure_latent_moments(graph, params, [np.full((4, 5, 16, 16, 3), 90, np.uint8)] * 3)
    assert np.isfinite(std).all()
    assert (std > 0).all()


def test_every_kind_of_mask_is_encoded_with_unknown_pixels_grey(tmp_path):
    source, masks = make_source([Grid(1, 16, 16), Grid(5, 16, 32), Grid(5, 32, 16)]), (Ending(), InsideOfBox())
    encoding = make_encoding(masks=masks)
    encode_latents(tmp_path / "l", source, encoding, plan_encoding(source, encoding), identity="a")
    latents = LatentSource(tmp_path / "l")
    assert [field.name for field in latents.fields] == [
        "cond_latents_0",
        "cond_mask_0",
        "cond_latents_1",
        "cond_mask_1",
    ]
    stride = MODEL.stride
    for index, view in enumerate(plan_encoding(source, encoding).views):
        number = latents.names.index(view.name)
        frames = read_fitted_clip(source, view.clip, view.limits, start=view.start).frames
        fields = latents.read_example(number)[1]
        for kind in range(2):
            cond_latents, shares = fields[f"cond_latents_{kind}"], fields[f"cond_mask_{kind}"]
            # The mask is that of whole rows and columns of latents, from which the pixels are known again.
            generator = rng.make_generator(kind, "mask of a view", zlib.crc32(view.name.encode()))
            generated = masks[kind].draw(generator, view.size)
            if generated is None:
                assert view.size.t == 1
                assert not cond_latents.any()
                assert not shares.any()
                continue
            np.testing.assert_allclose(shares, fold_mask(~generated, stride), atol=1e-2)
            grey = np.where(generated[..., None], 0, pixels.to_float(frames))[None]
            expected = np.asarray(_encode_frames(jnp.asarray(grey, jnp.float32)))[0]
            np.testing.assert_allclose(cond_latents, expected, atol=0.05, err_msg=f"{index} {kind}")
