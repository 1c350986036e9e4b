"""Evaluation of models of the rendered shapes: its prompts, and teacher and student side by side."""

from unittest.mock import Mock

import numpy as np
import pytest

import dit_video
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.sampling.pipeline import Pipeline
from dit_video.scenes import shapes
from dit_video.scenes.shape_metrics import PromptFollowing
from dit_video.scenes.shapes_evaluation import ShapesEvaluation, compare_few_steps, make_shape_requests


def test_every_prompt_is_asked_once_at_each_length_and_at_all_sizes():
    made = make_shape_requests(0)
    prompts = {t: sorted(request.prompt for request in made if request.size.t == t) for t in (1, 9, 17)}
    videos = sorted(map(shapes.format_caption, shapes.COMBINATIONS))
    assert prompts == {17: videos, 9: videos, 1: sorted(map(shapes.format_caption, shapes.IMAGES))}
    assert len(made) == 72 + 72 + 18
    sizes = [request.size[1:] for request in made]
    assert {size: sizes.count(size) for size in set(sizes)} == {(32, 32): 54, (32, 48): 54, (48, 32): 54}
    assert len({request.seed for request in made}) == len(made)


def test_two_evaluations_use_different_seeds():
    first, second = make_shape_requests(0), make_shape_requests(1)
    assert not {request.seed for request in first} & {request.seed for request in second}
    assert [request.size for request in first] != [request.size for request in second]
    assert all(0 <= request.seed < 2**32 for request in make_shape_requests(2**32 - 1))


def test_the_reference_of_a_prompt_of_shapes_follows_it_at_the_sample_s_size():
    protocol = ShapesEvaluation(seed=5)
    made = protocol.make_items(Mock(Pipeline), protocol.make_data(None))[::9]
    references = [each.read_reference() for each in made]
    prompts = [each.entry.prompt for each in made]
    judged = PromptFollowing().measure(MetricBatch(samples=references, prompts=prompts))
    assert [result.size for result in judged] == [each.entry.size for each in made]
    for each, result in zip(made, judged, strict=True):
        description, geometry = each.truth
        assert shapes.format_caption(description) == each.entry.prompt
        assert result.judgement.colour == description.colour
        below = shapes.get_centroid_offset(description.shape, geometry.radius)
        start = (geometry.row + below) / result.size.h, geometry.column / result.size.w
        assert result.judgement.start == pytest.approx(start, abs=0.03)
        assert each.is_trained_caption == (description not in shapes.HELD_OUT)


@pytest.mark.slow
def test_teacher_and_student_are_compared(tiny_run):
    teacher = dit_video.load(tiny_run)
    done = []
    table = compare_few_steps(teacher, teacher, reference_steps=3, few_steps=(2,), seeds=(0,), progress=done.append)
    assert list(table) == ["teacher, 3 steps", "teacher, 2 steps", "student, 2 steps"]
    assert done == [1, 2, 3]
    assert table["teacher, 2 steps"] == table["student, 2 steps"]
    assert table["teacher, 3 steps"]["samples"] == 162
    for row in table.values():
        assert row["following"] == pytest.approx(np.mean([row[name] for name in ("colour", "direction", "shape")]))
