import csv
import itertools
from collections import Counter

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.rng import make_generator
from dit_video.scenes import shapes
from dit_video.scenes.shapes import COLOURS, DIRECTIONS, SHAPES, Description, Geometry
from dit_video.tokens import Grid
from dit_video.video import decode


def alpha(clip, colour):
    """Return the shape's coverage of every pixel."""
    background = np.asarray(shapes.BACKGROUND, float)
    light = np.asarray(COLOURS[colour], float) - background
    return (clip.frames - background) @ light / (light @ light)


def test_held_out_combinations_are_covered_by_training():
    assert (len(shapes.COMBINATIONS), len(shapes.HELD_OUT), len(shapes.TRAINING)) == (72, 12, 60)
    assert set(shapes.HELD_OUT) | set(shapes.TRAINING) == set(shapes.COMBINATIONS)
    assert not set(shapes.HELD_OUT) & set(shapes.TRAINING)
    values = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS}
    for name, choices in values.items():
        assert {getattr(one, name) for one in shapes.TRAINING} == set(choices)
    for first, second in itertools.combinations(values, 2):
        seen = {(getattr(one, first), getattr(one, second)) for one in shapes.TRAINING}
        assert seen == set(itertools.product(values[first], values[second]))


def test_held_out_combinations_are_balanced():
    assert set(Counter(one.colour for one in shapes.HELD_OUT).values()) == {2}
    assert set(Counter((one.shape, one.direction) for one in shapes.HELD_OUT).values()) == {1}
    assert len({(one.shape, one.direction) for one in shapes.HELD_OUT}) == 12


@pytest.mark.parametrize("description", [*shapes.COMBINATIONS, *shapes.IMAGES])
def test_parse_inverts_caption(description):
    assert shapes.parse_caption(shapes.format_caption(description)) == description
    assert shapes.parse_caption(f"  {shapes.format_caption(description).upper()} ") == description


def test_captions_read_as_stated():
    assert (
        shapes.format_caption(Description(colour="red", shape="circle", direction="left")) == "a red circle moving left"
    )
    assert shapes.format_caption(Description(colour="red", shape="circle")) == "a red circle"


@pytest.mark.parametrize(
    "prompt", ["", "a red circle moving", "red circle", "a pink circle", "a red circle moving left fast", "a red left"]
)
def test_parse_refuses_other_prompts(prompt):
    with pytest.raises(UserError, match=r"a COLOUR SHAPE \[moving DIRECTION\]"):
        shapes.parse_caption(prompt)


@pytest.mark.parametrize(
    ("shape", "area"),
    [("square", lambda r: 4 * r * r), ("circle", lambda r: np.pi * r * r), ("triangle", lambda r: 2 * r * r)],
)
@pytest.mark.parametrize("place", [(16.0, 16.0), (15.27, 17.81), (16.5, 15.03)])
def test_shapes_have_their_area_and_place(shape, area, place):
    """With anti-aliasing the coverage sums to the shape's true area, and its centroid is exact to 1/50 pixel."""
    radius = 6.3
    geometry = Geometry(row=place[0], column=place[1], radius=radius, speed=0.7)
    clip = shapes.render(Description(colour="white", shape=shape), geometry, frames=1, height=32, width=32)
    lit = alpha(clip, "white")[0]
    assert lit.sum() == pytest.approx(area(radius), rel=0.004)
    row = (lit.sum(axis=1) @ (np.arange(32) + 0.5)) / lit.sum()
    column = (lit.sum(axis=0) @ (np.arange(32) + 0.5)) / lit.sum()
    assert row == pytest.approx(place[0] + shapes.get_centroid_offset(shape, radius), abs=0.02)
    assert column == pytest.approx(place[1], abs=0.02)


@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_motion_is_exact_below_a_pixel(direction):
    geometry = Geometry(row=20.3, column=20.6, radius=5.5, speed=0.61)
    description = Description(colour="white", shape="circle", direction=direction)
    lit = alpha(shapes.render(description, geometry, frames=9, height=40, width=40), "white")
    places = np.stack([lit.sum(axis=2) @ (np.arange(40) + 0.5), lit.sum(axis=1) @ (np.arange(40) + 0.5)], axis=-1)
    places /= lit.sum(axis=(1, 2))[:, None]
    expected = np.asarray([20.3, 20.6]) + 0.61 * np.arange(9)[:, None] * np.asarray(DIRECTIONS[direction])
    np.testing.assert_allclose(places, expected, atol=0.02)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 48), (48, 32), (16, 24), (8, 8), (240, 320)])
def test_bounces_later_but_never_in_the_first_17_frames(height, width):
    for index, description in enumerate(shapes.COMBINATIONS):
        geometry = shapes.sample_geometry(make_generator(0, "test", index), description, height=height, width=width)
        centres = shapes.compute_centres(description, geometry, frames=1500, height=height, width=width)
        sign = np.asarray(DIRECTIONS[description.direction])
        axis = int(np.argmax(np.abs(sign)))
        np.testing.assert_allclose(
            np.diff(centres[:17], axis=0), np.broadcast_to(geometry.speed * sign, (16, 2)), atol=1e-9
        )
        steps = np.diff(centres[:, axis]) * sign[axis]
        assert (steps < 0).any()  # it came back
        for side, places in zip((height, width), centres.T, strict=True):
            assert places.min() >= geometry.radius - 1e-9
            assert places.max() <= side - geometry.radius + 1e-9


def test_a_long_clip_shows_the_bounce():
    description = Description(colour="green", shape="square", direction="right")
    geometry = Geometry(row=16.0, column=8.0, radius=6.0, speed=0.8)
    lit = alpha(shapes.render(description, geometry, frames=60, height=32, width=32), "green")
    columns = lit.sum(axis=1) @ (np.arange(32) + 0.5) / lit.sum(axis=(1, 2))
    assert np.all(np.diff(columns[:17]) > 0)
    turn = int(np.argmax(columns))
    assert 17 < turn < 30  # 18 pixels at 0.8 a frame
    assert columns[turn] == pytest.approx(26.0, abs=0.45)  # it turns between two frames
    assert np.all(np.diff(columns[turn + 1 : turn + 17]) < 0)
    np.testing.assert_allclose(lit.sum(axis=(1, 2)), 144, rtol=0.01)  # never cut by the border


@pytest.mark.parametrize("direction", [*DIRECTIONS, None])
def test_starts_are_uniform_over_the_free_area(direction):
    description = Description(colour="red", shape="circle", direction=direction)
    generator = make_generator(1, "test")
    places = [shapes.sample_geometry(generator, description, height=32, width=48) for _ in range(4000)]
    sign = DIRECTIONS[direction] if direction else (0, 0)
    for axis, side in enumerate((32, 48)):
        start = np.asarray([(place.row, place.column)[axis] for place in places])
        radius, travel = np.asarray([(place.radius, 16 * place.speed * sign[axis]) for place in places]).T
        low, high = radius - np.minimum(travel, 0), side - radius - np.maximum(travel, 0)
        share = (start - low) / (high - low)
        assert share.min() >= 0
        assert share.max() <= 1
        np.testing.assert_allclose(np.histogram(share, bins=8, range=(0, 1))[0] / 4000, 1 / 8, atol=0.025)
    assert 5 <= min(place.radius for place in places) < 5.01
    assert 6.99 < max(place.radius for place in places) <= 7
    assert min(place.speed for place in places) >= 0.55
    assert max(place.speed for place in places) <= 0.8


def test_impossible_renderings_are_refused():
    description = Description(colour="red", shape="circle")
    inside = Geometry(row=10.0, column=10.0, radius=5.0, speed=0.6)
    with pytest.raises(UserError, match="at least 8 pixels"):
        shapes.sample_geometry(make_generator(0, "test"), description, height=7, width=32)
    with pytest.raises(UserError, match="leaves the frame"):
        shapes.render(description, inside, frames=1, height=14, width=32)
    with pytest.raises(UserError, match="at least one frame"):
        shapes.render(description, inside, frames=0, height=32, width=32)
    with pytest.raises(UserError, match="shape='star'"):
        shapes.render(Description(colour="red", shape="star"), inside, frames=1, height=32, width=32)


def test_examples_are_a_mixture_and_never_held_out():
    drawn = [shapes.draw_example(index, seed=0) for index in range(3000)]
    sizes = Counter(size for _, _, size in drawn)
    assert set(sizes) == set(shapes.SIZES)
    assert sum(count for size, count in sizes.items() if size.t == 1) / 3000 == pytest.approx(0.15, abs=0.02)
    assert min(count for size, count in sizes.items() if size.t > 1) > 350
    assert {description for description, _, size in drawn if size.t > 1} == set(shapes.TRAINING)
    assert {description for description, _, size in drawn if size.t == 1} == set(shapes.IMAGES)


def test_an_example_is_a_function_of_seed_and_index():
    again = shapes.render_example(7, seed=3)
    np.testing.assert_array_equal(shapes.render_example(7, seed=3).frames, again.frames)
    assert shapes.draw_example(7, seed=3) != shapes.draw_example(7, seed=4)
    assert shapes.draw_example(7, seed=3) != shapes.draw_example(8, seed=3)


def table(folder):
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_write_folder_writes_clips_and_captions(tmp_path):
    calls = []
    folder = shapes.write_folder(tmp_path / "shapes", count=40, seed=5, progress=lambda *state: calls.append(state))
    rows = table(folder)
    assert calls == [(index + 1, 40) for index in range(40)]
    assert len(rows) == 40
    assert {path.name for path in folder.iterdir()} == {"clips", "metadata.csv", "recipe.json"}
    assert len(list((folder / "clips").iterdir())) == 40
    for index, row in enumerate(rows):
        clip, back = shapes.render_example(index, seed=5), decode(folder / row["file_name"])
        assert row["text"] == clip.caption
        assert row["file_name"].endswith(".png" if len(clip.frames) == 1 else ".mp4")
        assert back.frames.shape == clip.frames.shape
        assert np.abs(back.frames.astype(int) - clip.frames).mean() < 6
        assert len(back.frames) == 1 or back.fps == 8


def test_write_folder_goes_on_where_it_stopped(tmp_path):
    sizes = (Grid(1, 16, 16), Grid(3, 16, 24))
    whole = shapes.write_folder(tmp_path / "whole", count=12, seed=1, sizes=sizes)

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shapes.write_folder(tmp_path / "parts", count=12, seed=1, sizes=sizes, progress=stop)
    assert not (tmp_path / "parts" / "metadata.csv").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts" / "clips").iterdir()}
    assert len(kept) == 5
    parts = shapes.write_folder(tmp_path / "parts", count=12, seed=1, sizes=sizes)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for path in whole.rglob("*.*"):
        assert path.read_bytes() == (parts / path.relative_to(whole)).read_bytes()
    longer = shapes.write_folder(parts, count=14, seed=1, sizes=sizes)
    assert table(longer)[:12] == table(whole)
    assert len(table(longer)) == 14


def test_write_folder_refuses_another_recipe(tmp_path):
    shapes.write_folder(tmp_path, count=1, seed=1)
    with pytest.raises(UserError, match="another seed"):
        shapes.write_folder(tmp_path, count=1, seed=2)
    with pytest.raises(UserError, match="at least one size"):
        shapes.write_folder(tmp_path, count=1, seed=1, sizes=())
    with pytest.raises(UserError, match="at least one size"):
        shapes.write_folder(tmp_path, count=0, seed=1)


def test_a_circle_is_finite_where_two_ways_to_square_its_radius_differ():
    radius = 5.931428627780212  # pow(radius, 2) < radius * radius by a bit
    geometry = shapes.Geometry(row=16.0, column=16.0, radius=radius, speed=0.6)
    clip = shapes.render(shapes.parse_caption("a red circle"), geometry, frames=1, height=32, width=32)
    assert (clip.frames[0, 0] == shapes.BACKGROUND).all()
