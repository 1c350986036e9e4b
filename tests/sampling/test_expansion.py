"""Prompts that a language model expands, and their traces in lists and recipes."""

import json

import numpy as np
import pytest

import dit_video
from dit_video.core.chat import ChatServer
from dit_video.core.errors import MissingError, UserError
from dit_video.families import get_prompt_instructions
from dit_video.families.ltx.transformer import LTX_INSTRUCTIONS
from dit_video.families.wan.transformer import WAN_INSTRUCTIONS
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.ltx import LtxDitConfig
from dit_video.models.backbones.vace import VaceDitConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.sampling import expansion
from dit_video.sampling.clip_recipe import describe_request
from dit_video.sampling.expansion import INSTRUCTIONS, ExpandedPrompt, PromptExpander
from dit_video.sampling.request import Request
from dit_video.sampling.request_file import read_request, write_request
from dit_video.sampling.tasks import DescribedEdit, Extend
from dit_video.sampling.tasks.task_file import TaskEntry, read_task, write_task
from dit_video.video import Clip
from dit_video.video.comments import read_recipe
from support.chat_server import StandIn, complete, fail

LONG = "A grey cat sits on a sunny windowsill and turns its head."


@pytest.fixture
def server():
    stand_in = StandIn()
    stand_in.answer = lambda number, body: complete(LONG)
    yield stand_in
    stand_in.close()


def make_expander(server, **options):
    return PromptExpander(server=ChatServer(url=server.url, model="qwen", retries=0, timeout=5.0), **options)


def test_a_prompt_is_expanded_once(server, tmp_path):
    expander = make_expander(server, cache=tmp_path / "cache", instructions="Write more.")
    expanded = expander(" a cat ")
    assert (expanded, expanded.original) == (LONG, "a cat")
    assert [
        expander("a cat"),
        make_expander(server, cache=tmp_path / "cache", instructions="Write more.")("a cat"),
    ] == [LONG] * 2
    ((path, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert body["messages"] == [
        {"role": "system", "content": "Write more."},
        {"role": "user", "content": "a cat"},
    ]
    make_expander(server, cache=tmp_path / "cache")("a cat")  # by other instructions
    assert len(server.requests) == 2
    assert expander("") == ""
    assert expander(expanded) is expanded
    assert len(server.requests) == 2
    assert expander.recall(LONG).original == "a cat"
    assert not isinstance(expander.recall("a dog"), ExpandedPrompt)


def test_the_first_of_several_processes_asks(server, monkeypatch):
    monkeypatch.setattr(expansion, "broadcast_values", lambda value: iter([LONG, value]))
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert make_expander(server)("a cat") == LONG
    assert server.requests == []
    monkeypatch.setattr(expansion, "broadcast_values", lambda value: iter([UserError("no answer"), value]))
    with pytest.raises(UserError, match="no answer"):
        make_expander(server)("a cat")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("<think>short, so\nI add more</think>\n\nA cat\nsits.", "A cat sits."),
        ("short, so\nI add more</think>\n\nA cat sits.", "A cat sits."),
        ('"A cat sits."', "A cat sits."),
        ('“A cat says "no".”', '“A cat says "no".”'),
        ('"One" and "two"', '"One" and "two"'),
    ],
)
def test_an_answer_is_one_paragraph(server, answer, text):
    server.answer = lambda number, body: complete(answer)
    assert make_expander(server)("a cat") == text


def test_tasks_that_go_by_a_difference_of_descriptions_are_not_expanded(server):
    expander, clip = make_expander(server), Clip(frames=np.zeros((5, 16, 16, 3), np.uint8), fps=8)
    edit = DescribedEdit(clip, "a cat", source="a dog")
    assert expander.expand(edit) is edit
    assert expander.expand(Extend(clip, "a cat", frames=4)).prompt == LONG
    request = Request("")
    assert expander.expand(request) is request


@pytest.mark.parametrize("answer", ["<think>nothing</think>", "<think>so long that no answer"])
def test_servers_that_answer_nothing_are_named(server, answer):
    server.answer = lambda number, body: complete(answer)
    with pytest.raises(UserError, match="answers nothing"):
        make_expander(server)("a cat")


def test_servers_that_do_not_answer_are_named(server):
    server.answer = lambda number, body: fail(404)
    with pytest.raises(UserError, match="answers 404"):
        make_expander(server)("a cat")
    with pytest.raises(MissingError, match="no key"):
        PromptExpander(server=ChatServer(url="https://example.com/v1", model="m", key_variable="NO_KEY"))("a cat")


@pytest.mark.parametrize(
    ("config", "instructions"),
    [
        (WanDitConfig(), WAN_INSTRUCTIONS),
        (VaceDitConfig(), WAN_INSTRUCTIONS),
        (LtxDitConfig(), LTX_INSTRUCTIONS),
        (DiTConfig(channels=2, context_width=6), INSTRUCTIONS),
    ],
)
def test_instructions_are_those_of_the_models_family(config, instructions):
    assert get_prompt_instructions(config) == instructions


def test_recipes_and_lists_name_what_was_expanded(server, tiny_pipeline, tmp_path):
    expander = make_expander(server)
    request = expander.expand(Request("a cat"))
    assert describe_request(request)["expanded_from"] == "a cat"
    entry = json.loads(json.dumps(write_request(request, tmp_path)))
    again = read_request(entry, tmp_path)
    assert (again, again.prompt.original) == (request, "a cat")
    clip = tiny_pipeline.generate(expander("a cat"), size=(5, 16, 16), steps=1)
    clip.save(tmp_path / "clip.mp4")
    recipe = read_recipe(tmp_path / "clip.mp4")
    assert (recipe["prompt"], recipe["expanded_from"]) == (LONG, "a cat")
    task = expander.expand(Extend(clip=clip, frames=4, prompt="a cat"))
    written = json.loads(json.dumps(write_task(TaskEntry(task), tmp_path)))
    assert read_task(written, tmp_path).task.prompt.original == "a cat"
    plain = Extend(clip=clip, frames=4)
    assert expander.expand(plain) is plain


def test_the_command_line_expands_prompts(server, tiny_run, tmp_path, script, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rules.txt").write_text("Be brief.")
    options = ("--expand", "qwen", "--expand-url", server.url, "--steps", 1, "--size", "5x16x16")
    arguments = ("--prompt", "a cat", *options, "--expand-instructions", tmp_path / "rules.txt")
    done = script("experiments/sample.py", tiny_run, *arguments, "--out", tmp_path / "clip.mp4")
    assert done.code == 0, done.err
    assert server.requests[0][1]["messages"][0]["content"] == "Be brief."
    assert read_recipe(tmp_path / "clip.mp4")["expanded_from"] == "a cat"
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    done = script(
        "experiments/sample.py", tiny_run, "--prompts", tmp_path / "prompts.txt", *options, "--out", tmp_path / "out"
    )
    assert done.code == 0, done.err
    entries = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert [(entry["prompt"], entry["expanded_from"]) for entry in entries] == [(LONG, "a cat"), (LONG, "a dog")]
    assert dit_video.load(tiny_run).config.model.backbone is not None
    done = script("experiments/sample.py", tiny_run, "--prompt", "a", "--expand", "", "--out", tmp_path / "x.mp4")
    assert done.code == 2
    assert "no model" in done.err or "model=''" in done.err
