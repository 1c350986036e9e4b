"""The field of a prompt: prompts of the model while it is empty, and expansion by a language model."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_an_empty_field_offers_prompts_of_the_model(studio):
    field = studio.field("prompt")
    chip = field.get_by_role("button", name="a blue square moving up")
    chip.click()
    assert field.locator("textarea").input_value() == "a blue square moving up"
    assert not chip.is_visible()
    assert not field.get_by_role("button", name="Expand").is_visible()  # the server has no language model
    studio.fill("prompt", "")
    assert chip.is_visible()


def test_a_prompt_is_expanded_and_restored(open_studio):
    studio = open_studio()
    answers = [{"prompt": "a red circle that moves left over a dark ground, in soft light"}]

    def describe(route):
        response = route.fetch()
        route.fulfill(response=response, json={**response.json(), "expands": True})

    def expand(route):
        assert json.loads(route.request.post_data) == {"prompt": "a red circle"}
        if answers:
            route.fulfill(json=answers.pop())
        else:
            route.fulfill(status=422, json={"error": "the server answers 500", "field": None})

    studio.page.route("**/api/model", describe)
    studio.page.route("**/api/expand", expand)
    studio.reload()
    field = studio.field("prompt")
    button, undo = (field.get_by_role("button", name=name) for name in ("Expand", "Undo"))
    assert button.is_disabled()
    studio.fill("prompt", "a red circle")
    button.click()
    undo.wait_for()
    assert field.locator("textarea").input_value().endswith("in soft light")
    undo.click()
    assert field.locator("textarea").input_value() == "a red circle"
    assert not undo.is_visible()
    button.click()
    field.get_by_text("the server answers 500").wait_for()
    assert field.locator("textarea").input_value() == "a red circle"
