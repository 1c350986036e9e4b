import itertools

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.rng import make_generator
from dit_video.evaluation.metrics.metric import MetricBatch, MetricValue
from dit_video.scenes.shape_metrics import (
    JudgedSample,
    Judgement,
    PromptFollowing,
    StartSpread,
    judge,
    judge_sample,
    score,
)
from dit_video.scenes.shapes import (
    BACKGROUND,
    COLOURS,
    COMBINATIONS,
    HELD_OUT,
    IMAGES,
    SHAPES,
    TRAINING,
    Description,
    Geometry,
    format_caption,
    parse_caption,
    render,
    sample_geometry,
)
from dit_video.tokens import Grid
from dit_video.video import Clip, decode
from support.marks import mark_slow_except

SIZES = ((32, 32), (32, 48), (48, 32))
RED = Description(colour="red", shape="circle", direction="left")


def render_clip(description, *, seed=0, frames=9, height=32, width=48):
    generator = make_generator(seed, "judge", height, width, frames, *format_caption(description).encode())
    geometry = sample_geometry(generator, description, height=height, width=width)
    return render(description, geometry, frames=frames, height=height, width=width)


def empty(frames=9, height=32, width=48):
    return np.broadcast_to(np.asarray(BACKGROUND, np.uint8), (frames, height, width, 3)).copy()


def blurred(frames, sigma=0.7):
    weights = np.exp(-(np.arange(-3, 4) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    frames = frames.astype(float)
    for axis in (1, 2):
        padded = np.pad(frames, [(3, 3) if index == axis else (0, 0) for index in range(4)], mode="edge")
        frames = sum(w * padded.take(range(i, i + frames.shape[axis]), axis=axis) for i, w in enumerate(weights))
    return frames


def right(description, verdict):
    return (verdict.colour, verdict.shape, verdict.direction) == (
        description.colour,
        description.shape,
        description.direction,
    )


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("frames", mark_slow_except([1, 9], [1, 9, 17]))
def test_written_and_read_clips_are_all_judged_right(tmp_path, height, width, frames):
    """There are 468 clips: every description at every size, in H.264 or PNG."""
    for index, description in enumerate(IMAGES if frames == 1 else COMBINATIONS):
        path = tmp_path / f"{index}.{'png' if frames == 1 else 'mp4'}"
        render_clip(description, seed=index, frames=frames, height=height, width=width).save(path)
        verdict = judge(decode(path))
        assert right(description, verdict), (description, verdict)
        names = ("colour", "shape") if frames == 1 else ("colour", "shape", "direction")
        assert score(description, verdict) == dict.fromkeys(names, True)


def test_blurred_and_noisy_clips_are_mostly_judged_right():
    descriptions, wrong = [*COMBINATIONS, *IMAGES], []
    for index, description in enumerate(descriptions):
        height, width = SIZES[index % 3]
        clip = render_clip(description, seed=1, frames=9 if description.direction else 1, height=height, width=width)
        noise = make_generator(2, "noise", index).normal(0, 12, clip.frames.shape)
        soft = np.clip(np.rint(blurred(clip.frames) + noise), 0, 255).astype(np.uint8)
        verdict = judge(Clip(soft, fps=8))
        if not right(description, verdict):
            wrong.append((description, verdict))
    assert len(wrong) <= 2, wrong


def test_dim_and_brighter_backgrounds_do_not_matter():
    clip = render_clip(RED)
    for change in (lambda f: 0.8 * f, lambda f: f + 8, lambda f: 0.9 * f + 5):
        frames = np.clip(np.rint(change(clip.frames.astype(float))), 0, 255).astype(np.uint8)
        assert right(RED, judge(Clip(frames, fps=8)))


def test_start_is_the_first_centroid():
    geometry = Geometry(row=12.0, column=30.0, radius=6.0, speed=0.6)
    start = judge(render(RED, geometry, frames=9, height=32, width=48)).start
    assert start == pytest.approx((12 / 32, 30 / 48), abs=0.003)


# What must not be judged right.


@pytest.mark.parametrize("frames", [1, 9])
def test_nothing_is_found_in_an_empty_clip(frames):
    assert judge(Clip(empty(frames), fps=8)) == Judgement()
    assert judge(Clip(np.zeros((frames, 32, 32, 3), np.uint8), fps=8)) == Judgement()


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_found_in_noise(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (9, 32, 32, 3)).astype(np.uint8)
    assert judge(Clip(noise, fps=8)) == Judgement()
    faint = np.clip(empty() + np.random.default_rng(seed).normal(0, 15, (9, 32, 48, 3)), 0, 255).astype(np.uint8)
    assert judge(Clip(faint, fps=8)) == Judgement()


def test_a_frame_full_of_colour_is_no_shape():
    frames = np.broadcast_to(np.asarray(COLOURS["red"], np.uint8), (9, 32, 32, 3)).copy()
    verdict = judge(Clip(frames, fps=8))
    assert (verdict.shape, verdict.direction, verdict.start) == (None, None, None)


def test_other_colours_are_not_of_the_palette():
    for other in ((255, 128, 0), (0, 220, 220), (110, 110, 110), (100, 0, 255), (90, 20, 20)):
        frames = empty()
        frames[:, 8:20, 10:22] = other
        assert judge(Clip(frames, fps=8)).colour is None, other


def test_swapped_colours_and_mirrored_motion_are_seen():
    for description in COMBINATIONS:
        clip = render_clip(description)
        backwards = judge(Clip(clip.frames[::-1].copy(), fps=8))
        opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[description.direction]
        assert (backwards.colour, backwards.shape, backwards.direction) == (
            description.colour,
            description.shape,
            opposite,
        )
        for verdict in (backwards, judge(clip)):
            for other in COMBINATIONS:
                graded = score(other, verdict)
                assert graded["colour"] == (other.colour == description.colour)
                assert graded["shape"] == (other.shape == description.shape)
                assert graded["direction"] == (other.direction == verdict.direction)


def test_a_still_clip_has_no_direction():
    still = Clip(render_clip(RED).frames[:1].repeat(9, axis=0), fps=8)
    noisy = np.clip(still.frames + make_generator(0, "noise").normal(0, 12, still.frames.shape), 0, 255).astype(
        np.uint8
    )
    for clip in (still, Clip(noisy, fps=8)):
        verdict = judge(clip)
        assert (verdict.colour, verdict.shape, verdict.direction) == ("red", "circle", None)
        assert score(RED, verdict) == {"colour": True, "shape": True, "direction": False}


def test_askew_motion_has_no_direction():
    frames = np.concatenate(
        [
            render(
                RED, Geometry(row=10.0 + i, column=10.0 + i, radius=6.0, speed=0.6), frames=1, height=32, width=32
            ).frames
            for i in range(9)
        ]
    )
    assert judge(Clip(frames, fps=8)).direction is None


def test_the_first_direction_counts_when_a_long_clip_bounces():
    geometry = Geometry(row=16.0, column=19.0, radius=6.0, speed=0.8)
    clip = render(RED, geometry, frames=60, height=32, width=32)
    assert judge(clip).direction == "left"


@pytest.mark.parametrize("second", ["red", "blue"])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_shapes_are_not_one(second, shape):
    frames = empty(9, 32, 64)
    for colour, column in (("red", 20.0), (second, 50.0)):
        description = Description(colour=colour, shape=shape, direction="left")
        one = render(
            description, Geometry(row=16.0, column=column, radius=6.0, speed=0.6), frames=9, height=32, width=64
        )
        frames = np.where(one.frames.sum(-1, keepdims=True) > empty(1, 1, 1).sum(), one.frames, frames)
    verdict = judge(Clip(frames, fps=8))
    assert (verdict.shape, verdict.direction) == (None, None)
    assert verdict.colour == ("red" if second == "red" else None)


def test_a_shape_that_disappears_is_not_found():
    frames = render_clip(RED).frames.copy()
    frames[5:] = empty(4)
    assert judge(Clip(frames, fps=8)).shape is None


@pytest.mark.parametrize(
    "draw",
    [
        lambda y, x: (abs(y) < 3) & (abs(x) < 8),  # a bar
        lambda y, x: abs(y) + abs(x) < 7,  # a diamond
        lambda y, x: (abs(y) < 7) & (abs(x) < (7 - y) / 2),  # a triangle upside down
        lambda y, x: (y**2 + x**2 < 49) & (y**2 + x**2 > 25),  # a ring
        lambda y, x: ((abs(y) < 2) | (abs(x) < 2)) & (abs(y) < 7) & (abs(x) < 7),  # a plus
    ],
)
def test_other_shapes_have_no_name(draw):
    frames = empty()
    y, x = np.mgrid[:32, :48]
    for index in range(9):
        frames[index][draw(y - 16.0, x - (20.0 + index))] = COLOURS["green"]
    verdict = judge(Clip(frames, fps=8))
    assert verdict.colour == "green"
    assert verdict.shape is None


# The metric.


def make_judgement(description, **changes):
    values = {"colour": description.colour, "shape": description.shape, "direction": description.direction, **changes}
    return Judgement(**values, start=(0.5, 0.5))


def test_rates_are_counted_by_group():
    size = Grid(9, 32, 32)
    results = [JudgedSample(description=one, judgement=make_judgement(one), size=size) for one in TRAINING]
    results += [
        JudgedSample(description=one, judgement=make_judgement(one, colour="white"), size=size) for one in HELD_OUT
    ]
    results += [JudgedSample(description=one, judgement=Judgement(), size=Grid(1, 32, 32)) for one in IMAGES]
    values = PromptFollowing().compute(tuple(results))
    assert [values[f"{name}_seen"].value for name in ("colour", "shape", "direction")] == [1, 1, 1]
    assert values["colour_seen"].count == 60
    white = sum(one.colour == "white" for one in HELD_OUT)
    assert values["colour_never_seen"].value == white / 12
    assert (values["shape_never_seen"].value, values["direction_never_seen"].value) == (1, 1)
    assert (values["colour_images"].value, values["colour_images"].count) == (0.0, 18)
    assert values["colour_images"].interval == pytest.approx((0.0, 0.1759), abs=1e-4)
    assert values["direction_images"] == MetricValue(value=None, interval=(0.0, 1.0), count=0)
    assert values["shape"].value == 72 / 90
    assert values["direction"].count == 72


def test_samples_are_judged_by_their_prompts():
    clips = [render_clip(one) for one in COMBINATIONS[:3]]
    prompts = [format_caption(COMBINATIONS[0]), *map(format_caption, COMBINATIONS[:2])]
    metric = PromptFollowing()
    state = metric.update(metric.init(), MetricBatch(samples=clips, prompts=prompts))
    assert [result.judgement for result in state] == list(map(judge, clips))
    answers = [{"colour": True, "shape": True, "direction": True}]
    for description, drawn in itertools.pairwise(COMBINATIONS[:3]):
        names = ("colour", "shape", "direction")
        answers.append({name: getattr(description, name) == getattr(drawn, name) for name in names})
    assert metric.list_examples(state) == answers
    with pytest.raises(UserError, match="a sunset"):
        metric.measure(MetricBatch(samples=clips[:1], prompts=["a sunset"]))


def compute_spread(results, **options):
    return StartSpread(**options).compute(tuple(results))


@pytest.mark.slow
def test_the_spread_of_rendered_clips_is_that_of_the_data():
    results = []
    for direction in ("left", "right", "up", "down", None):
        for index in range(150):
            height, width = SIZES[index % 3]
            words = f"a {list(COLOURS)[index % 6]} {SHAPES[index // 3 % 3]}" + (
                f" moving {direction}" if direction else ""
            )
            description = parse_caption(words)
            generator = make_generator(index, "judge", height, width, 1, *format_caption(description).encode())
            geometry = sample_geometry(generator, description, height=height, width=width)
            results.append(
                judge_sample(description, render(description, geometry, frames=1, height=height, width=width))
            )
    spread = compute_spread(results, draws=30)
    for name in ("left", "right", "up", "down", "image"):
        for axis in ("vertical", "horizontal"):
            ratio = spread[f"start_spread_{name}_{axis}"]
            assert ratio.count == 150
            assert ratio.value == pytest.approx(1.0, abs=0.17), (name, axis)
            assert ratio.interval[0] < ratio.value < ratio.interval[1]
            assert ratio.interval[1] - ratio.interval[0] == pytest.approx(0.16, abs=0.08)
    assert 0.83 < spread["start_spread"].value < 1


def test_collapsed_starts_are_seen():
    collapsed = [
        judge_sample(
            RED, render(RED, Geometry(row=16.0, column=column, radius=6.0, speed=0.6), frames=9, height=32, width=32)
        )
        for column in np.linspace(17, 25, 20)
    ]
    spread = compute_spread(collapsed)
    assert spread["start_spread_left_vertical"].value < 0.01
    assert spread["start_spread_left_horizontal"].value > 0.8
    assert spread["start_spread"].value == spread["start_spread_left_vertical"].value
    assert (spread["start_spread_up_vertical"].value, spread["start_spread_up_vertical"].count) == (None, 0)
    low, high = spread["start_spread_left_horizontal"].interval
    assert low < spread["start_spread_left_horizontal"].value < high


def test_a_position_is_drawn_for_the_size_of_its_sample():
    """The ratio is that of the standard deviations, here of two samples and their renderings."""
    columns, size = (10.0, 22.0), Grid(1, 32, 32)
    clips = [
        render(RED, Geometry(row=16.0, column=column, radius=6.0, speed=0.6), frames=9, height=32, width=32)
        for column in columns
    ]
    results = [judge_sample(RED, clip) for clip in clips]
    starts = [result.judgement.start[1] for result in results]
    ratio = compute_spread(results)["start_spread_left_horizontal"]
    deviation = abs(starts[1] - starts[0]) / 2**0.5
    assert ratio.note.startswith(f"samples {deviation:.3f}, data ")
    assert ratio.value == pytest.approx(deviation / float(ratio.note.split("data ")[1].split()[0]), rel=0.01)
    assert deviation == pytest.approx((columns[1] - columns[0]) / size.w / 2**0.5, rel=0.05)
