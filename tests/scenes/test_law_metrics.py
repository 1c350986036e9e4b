"""Laws of motion on rendered scenes: true renderings keep them, and wrong clips do not."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.scenes import render, simulate
from dit_video.scenes.law_metrics import ContinuationError, fit_contact, fit_motion
from dit_video.scenes.laws import LAWS, MIN_FRAMES, SIZES, draw_physics_scene
from dit_video.scenes.objects import find_post
from dit_video.scenes.physics import exchange_momentum
from dit_video.scenes.protocols import PHYSICS_METRICS, SceneTruth
from dit_video.tokens import Grid
from support.physics_truths import make_physics_truths

COUNTS = [24, pytest.param(64, marks=pytest.mark.nightly)]
"""Numbers of scenes of each law in slow tests."""

METRICS = {metric.law: metric for metric in PHYSICS_METRICS}
FINE = 16
"""Steps of a simulation per frame, from which controls take other times."""


@cache
def get_truths(law, count=6):
    return make_physics_truths(law, count=count, seed=5)


def get_share(law, clips, truths):
    metric = METRICS[law]
    value = metric.compute(metric.update(metric.init(), MetricBatch(samples=clips, scenes=truths)))[metric.name]
    assert value.count == len(clips)
    return value.value


def add_noise(clip, deviation=5.0):
    """Return a clip as an autoencoder might reconstruct it."""
    noise = np.random.default_rng(clip.frames.size).normal(0, deviation, clip.frames.shape)
    return replace(clip, frames=np.clip(clip.frames + noise, 0, 255).astype(np.uint8))


def render_motion(scene, centres):
    """Render a scene whose objects are at other places, `[T N 2]`; nan for an object that is not there."""
    frames, still = [], replace(scene, size=scene.size._replace(t=1), gravity=0.0)
    for places in centres:
        objects = [
            replace(each, start=(float(place[0]), float(place[1])))
            for each, place in zip(scene.objects, places, strict=True)
            if np.isfinite(place).all()
        ]
        frames.append(render(replace(still, objects=tuple(objects))).clip.frames[0])
    return replace(render(still).clip, frames=np.stack(frames))


def get_centres(scene):
    return simulate(scene).centres


def warp_time(warp):
    """Return a control in which a clip shows the scene at other times, smoothly; 1 is the clip's end."""

    def control(scene):
        steps = FINE * (scene.size.t - 1) + 1
        fine = replace(scene, fps=FINE * scene.fps, size=scene.size._replace(t=steps))
        centres = get_centres(fine)
        times = np.rint(warp(np.linspace(0, 1, scene.size.t)) * FINE * (scene.size.t - 1)).astype(int)
        return centres[times]

    return control


def rise(scene):
    return get_centres(scene)[::-1]


def fall_uniformly(scene):
    return np.linspace(*get_centres(scene)[[0, -1]], scene.size.t)


def find_contact(scene):
    """Return the frame after the contact."""
    return int(np.ceil(simulate(scene).events[0].seconds * scene.fps))


def continue_motion(scene, factors, first):
    """Return a motion whose velocity changes by factors of each axis at a frame."""
    centres, start = get_centres(scene).copy(), np.array([each.velocity for each in scene.objects])
    times = np.arange(1, scene.size.t - first + 1)[:, None, None] / scene.fps
    centres[first:] = centres[first - 1] + times * start * factors
    return centres


def lose_speed(scene):
    """Return a bounce after which the disc is half as fast."""
    centres, frame = get_centres(scene).copy(), find_contact(scene)
    centres[frame:] = centres[frame] + (centres[frame:] - centres[frame]) / 2
    return centres


def turn_back(scene):
    """Return a bounce after which the disc goes the way back that it came."""
    return continue_motion(scene, -1.0, find_contact(scene))


def turn_in_mid_air(scene):
    """Return a bounce off nothing, a fifth of the frame's side away from the wall."""
    place = simulate(scene).events[0].position
    height, width = scene.size.h, scene.size.w
    distances = np.array([place[0], place[1], height - place[0], width - place[1]])
    shift = [(1, 0), (0, 1), (-1, 0), (0, -1)][int(distances.argmin())]
    return get_centres(scene) + 0.2 * min(height, width) * np.array(shift)


def pass_through(scene):
    return continue_motion(scene, 1.0, 1)


def stick(scene):
    """Return a collision after which both discs move with their centre of mass."""
    centres, frame = get_centres(scene).copy(), find_contact(scene)
    masses = np.array([each.radius for each in scene.objects]) ** 2
    velocity = masses @ np.array([each.velocity for each in scene.objects]) / masses.sum()
    times = np.arange(1, scene.size.t - frame + 1)[:, None, None] / scene.fps
    centres[frame:] = centres[frame - 1] + times * velocity
    return centres


def stop(scene):
    return continue_motion(scene, 0.0, find_contact(scene))


def split_hidden(scene):
    """Return the centres, and True from the frame on in which the post hides most of the object."""
    centres = get_centres(scene).copy()
    middle = int(np.abs(centres[:, 0, 1] - scene.occluder.column).argmin())
    return centres, np.arange(len(centres)) >= middle


def vanish(scene):
    centres, is_later = split_hidden(scene)
    centres[is_later] = np.nan
    return centres


def come_out_elsewhere(scene):
    """Return a motion that goes on a quarter of the frame's height higher or lower."""
    centres, is_later = split_hidden(scene)
    shift = 0.25 * scene.size.h
    centres[is_later] += (shift if centres[0, 0, 0] < scene.size.h / 2 else -shift, 0.0)
    return centres


def wait_behind(scene):
    """Return a motion that pauses behind the post for four frames."""
    centres, is_later = split_hidden(scene)
    middle = int(is_later.argmax())
    return np.concatenate([centres[:middle], np.repeat(centres[middle : middle + 1], 4, axis=0), centres[middle:]])[
        : len(centres)
    ]


def come_back(scene):
    centres, is_later = split_hidden(scene)
    middle = int(is_later.argmax())
    centres[middle:] = centres[2 * middle - np.arange(middle, len(centres))]
    return centres


QUADRATIC = warp_time(lambda times: times**2)
FAST_CONTROLS = [
    ("free_fall", rise),
    ("bounce", lose_speed),
    ("collision", pass_through),
    ("permanence", come_out_elsewhere),
]
CONTROLS = [
    ("free_fall", rise),
    ("free_fall", fall_uniformly),
    ("free_fall", warp_time(lambda times: times / 1.5)),
    ("free_fall", QUADRATIC),
    ("bounce", QUADRATIC),
    ("bounce", lose_speed),
    ("bounce", turn_back),
    ("bounce", turn_in_mid_air),
    ("bounce", stop),
    ("collision", QUADRATIC),
    ("collision", pass_through),
    ("collision", stop),
    ("collision", stick),
    ("permanence", QUADRATIC),
    ("permanence", vanish),
    ("permanence", come_out_elsewhere),
    ("permanence", wait_behind),
    ("permanence", come_back),
]


def name_controls(controls):
    return ["-".join((law, getattr(control, "__name__", "warp"))) for law, control in controls]


@pytest.mark.parametrize("law", LAWS)
def test_renderings_keep_the_law(law):
    truths = get_truths(law)
    clips = [truth.reference for truth in truths]
    assert get_share(law, clips, truths) == 1
    assert get_share(law, list(map(add_noise, clips)), truths) == 1


@pytest.mark.nightly
@pytest.mark.parametrize(("law", "control"), FAST_CONTROLS, ids=name_controls(FAST_CONTROLS))
def test_wrong_motion_does_not_keep_the_law(law, control):
    truths = get_truths(law)
    clips = [render_motion(truth.scene, control(truth.scene)) for truth in truths]
    assert get_share(law, clips, truths) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("law", LAWS)
def test_many_renderings_keep_the_law(law, count):
    truths = get_truths(law, count)
    clips = [truth.reference for truth in truths]
    assert get_share(law, clips, truths) == 1
    assert get_share(law, list(map(add_noise, clips)), truths) == 1


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("law", "control"), CONTROLS, ids=name_controls(CONTROLS))
def test_much_wrong_motion_does_not_keep_the_law(law, control, count):
    truths = get_truths(law, count)
    clips = [render_motion(truth.scene, control(truth.scene)) for truth in truths]
    assert get_share(law, clips, truths) < 0.2


@pytest.mark.parametrize("law", [law for law in LAWS if law != "free_fall"])
def test_laws_that_do_not_know_the_direction_of_time_hold_in_reverse(law):
    truths = get_truths(law)
    clips = [replace(truth.reference, frames=truth.reference.frames[::-1]) for truth in truths]
    assert get_share(law, clips, truths) == 1


def test_an_object_in_front_of_the_post_is_not_hidden():
    truths = get_truths("permanence")
    scenes = [replace(truth.scene, occluder=replace(truth.scene.occluder, depth=2.0)) for truth in truths]
    assert get_share("permanence", [render(scene).clip for scene in scenes], truths) == 0


@pytest.mark.nightly
def test_the_mass_of_a_disc_is_the_square_of_its_radius():
    """Discs of different radii that exchange momentum as if their masses were equal do not keep the law."""
    truths = [
        truth
        for truth in make_physics_truths("collision", count=24, seed=6, sizes=[Grid(17, 48, 72)])
        if {each.size for each in truth.scene.objects} == {"small", "large"}
    ][:6]
    clips = []
    for truth in truths:
        scene = truth.scene
        centres, frame = get_centres(scene).copy(), find_contact(scene)
        velocities = np.array([each.velocity for each in scene.objects])
        event = simulate(scene).events[0]
        places = np.array([each.start for each in scene.objects]) + velocities * event.seconds
        normal = (places[1] - places[0]) / np.hypot(*(places[1] - places[0]))
        after = exchange_momentum(velocities, np.ones(2), normal)
        seconds = np.arange(frame, scene.size.t) / scene.fps - event.seconds
        centres[frame:] = places + seconds[:, None, None] * after
        clips.append(render_motion(scene, centres))
    assert get_share("collision", clips, truths) < 0.2


@pytest.mark.parametrize("law", LAWS)
def test_clips_without_objects_do_not_keep_the_law(law):
    truths = get_truths(law, 2)
    clips = [render(replace(truth.scene, objects=())).clip for truth in truths]
    assert get_share(law, clips, truths) == 0


def test_each_metric_counts_the_scenes_of_its_law():
    truths = [get_truths(law, 2)[0] for law in LAWS]
    batch = MetricBatch(samples=[truth.reference for truth in truths], scenes=truths)
    answers = [[True if one == each else None for one in range(4)] for each in range(4)]
    assert [metric.measure(batch) for metric in PHYSICS_METRICS] == answers
    assert [metric.law for metric in PHYSICS_METRICS] == list(LAWS)
    examples = [metric.list_examples(tuple(metric.measure(batch))) for metric in PHYSICS_METRICS]
    assert [[list(row) for row in rows] for rows in zip(*examples, strict=True)] == [
        [[metric.name] if metric is own else [] for metric in PHYSICS_METRICS] for own in PHYSICS_METRICS
    ]


def measure_errors(clips, truths, known=MIN_FRAMES):
    """Return the errors of places of samples that continue the scenes of one law."""
    truths = [SceneTruth(truth.scene, truth.law, known) for truth in truths]
    references = [render(truth.scene).clip for truth in truths]
    metric = ContinuationError()
    batch = MetricBatch(samples=clips, references=references, scenes=truths)
    return metric.compute(metric.update(metric.init(), batch))


@pytest.mark.parametrize("law", LAWS)
def test_errors_of_places_go_from_the_truth_to_a_still_clip(law):
    truths = get_truths(law, 3)
    clips = [truth.reference for truth in truths]
    numbers = [np.minimum(np.arange(len(clip.frames)), MIN_FRAMES - 1) for clip in clips]
    still = [replace(clip, frames=clip.frames[kept]) for clip, kept in zip(clips, numbers, strict=True)]
    empty = [render(replace(truth.scene, objects=())).clip for truth in truths]
    straight = []  # on from the last known frames, as if there were no law but inertia
    for truth in truths:
        centres = get_centres(truth.scene)
        last, velocity = centres[MIN_FRAMES - 1], centres[MIN_FRAMES - 1] - centres[MIN_FRAMES - 2]
        steps = np.arange(1, truth.scene.size.t - MIN_FRAMES + 1)[:, None, None]
        straight.append(render_motion(truth.scene, np.concatenate([centres[:MIN_FRAMES], last + steps * velocity])))
    found = [measure_errors(each, truths)[f"{law}_error"] for each in (clips, straight, still, empty)]
    errors = [each.value for each in found]
    assert errors[0] == 0
    assert errors[2:] == [1, 1]
    assert 0.15 < errors[1] < 2 or law == "permanence"
    assert [each.count for each in found] == [3] * 4
    assert measure_errors(clips, truths, known=0)[f"{law}_error"].value is None


@pytest.mark.nightly
def test_posts_are_where_the_scenes_have_them():
    truths = get_truths("permanence")
    for truth in truths:
        for clip in (truth.reference, add_noise(truth.reference, 10.0)):
            post = find_post(clip, truth.scene.background)
            assert post.column == pytest.approx(truth.scene.occluder.column, abs=0.5)
            assert post.half_width == pytest.approx(truth.scene.occluder.half_width, abs=0.5)
        without = replace(truth.scene, occluder=None)
        assert find_post(render(without).clip, without.background) is None
        lighter = replace(without, background="grey")
        assert find_post(render(lighter).clip, "grey") is None
        assert get_share("permanence", [render(without).clip], [truth]) == 0


def test_a_post_of_another_place_hides_an_object_alike():
    """A caption does not say where the post stands: the sample's own counts."""
    truths = get_truths("permanence")
    moved = [
        truth._replace(scene=replace(truth.scene, occluder=replace(truth.scene.occluder, column=3.0)))
        for truth in truths
    ]
    assert get_share("permanence", [truth.reference for truth in truths], moved) == 1


@pytest.mark.parametrize("law", LAWS)
def test_scenes_are_functions_of_their_number_and_show_one_contact_at_most(law):
    first, again = (draw_physics_scene(3, seed=5, law=law) for _ in range(2))
    assert first == again
    assert first != draw_physics_scene(4, seed=5, law=law)
    assert first != draw_physics_scene(3, seed=6, law=law)
    assert first.size in SIZES[law]
    assert first.contacts == ((law,) if law in ("bounce", "collision") else ())


def test_a_size_without_room_is_an_error():
    with pytest.raises(UserError, match="17x32x32"):
        draw_physics_scene(0, seed=0, law="free_fall", sizes=[Grid(17, 32, 32)])
    with pytest.raises(UserError, match="levitation"):
        draw_physics_scene(0, seed=0, law="levitation")


def test_collisions_keep_momentum_and_energy():
    velocities, masses = np.array([[3.0, 1.0], [-2.0, 0.5]]), np.array([4.0, 1.0])
    after = exchange_momentum(velocities, masses, np.array([0.6, 0.8]))
    np.testing.assert_allclose(masses @ after, masses @ velocities)
    energies = [masses @ np.square(each).sum(axis=1) for each in (velocities, after)]
    assert energies[0] == pytest.approx(energies[1])
    assert not np.allclose(after, velocities)


def test_fits_are_exact_for_exact_motion():
    seconds = np.arange(9) / 8
    parabola = np.stack([3 + 2 * seconds + 5 * seconds**2, 7 - seconds], axis=-1)
    fit = fit_motion(seconds, parabola, is_accelerated=True)
    np.testing.assert_allclose(fit.acceleration, [10, 0], atol=1e-9)
    np.testing.assert_allclose(fit.predict(seconds), parabola, atol=1e-9)
    assert fit.residual < 1e-9
    assert fit_motion(seconds, parabola).residual > 0.1
    kink = np.stack([np.abs(seconds - 0.55) * 4, seconds], axis=-1)[:, None]
    contact = fit_contact(seconds, kink)
    assert contact.seconds == pytest.approx(0.55)
    assert max(contact.gap, contact.residual) < 1e-9
    assert fit_contact(seconds[:7], kink[:7]) is None
