import numpy as np
import pytest

from dit_video.core.rng import make_generator
from dit_video.scenes.shape_metrics import StartSpread, judge_sample
from dit_video.scenes.shapes import (
    COLOURS,
    SHAPES,
    Description,
    Geometry,
    format_caption,
    parse_caption,
    render,
    sample_geometry,
)
from dit_video.tokens import Grid

SIZES = ((32, 32), (32, 48), (48, 32))
RED = Description(colour="red", shape="circle", direction="left")


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
