"""Captions by a stand-in for a server: retries, refusals, garbage, limits, cut connections, keys and costs."""

import base64
import contextlib
import dataclasses
import io
import json
import re
import traceback

import numpy as np
import pytest
from PIL import Image

from dit_video.core.chat import ChatServer
from dit_video.core.errors import MissingError, UserError
from dit_video.curation.annotate import annotate
from dit_video.curation.captions import MAX_FAILURES, Captions
from dit_video.data.tables import Table
from support.annotated_clips import make_clip, open_clips
from support.chat_server import StandIn, complete, fail

COUNT = 5


@pytest.fixture
def server():
    stand_in = StandIn()
    yield stand_in
    stand_in.close()


@pytest.fixture
def source(tmp_path):
    return open_clips(tmp_path, {f"{number}.mp4": make_clip(number) for number in range(COUNT)}, {"0.mp4": ("a cat",)})


def make(server, **options):
    chat = ChatServer(url=server.url, model="qwen", retries=2, timeout=5.0)
    return Captions(server=chat, frames=3, max_side=24, **options)


def read(source, name="captions_long"):
    table = Table(source.folders[0])
    return table.arrow(name).to_pylist(), table.arrow(f"{name}_error").to_pylist()


def test_a_caption_is_asked_for_with_frames_and_the_prompt(server, source):
    annotator = make(server, prompt="{frames} frames, {seconds} s, was: {caption}")
    report = annotate(source, annotator)
    assert report.failures == {}
    path, body = next((path, body) for path, body in server.requests if "a cat" in str(body))
    assert (path, body["model"], body["max_tokens"]) == ("/v1/chat/completions", "qwen", 400)
    *pictures, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "3 frames, 1 s, was: a cat"}
    kinds, contents = zip(*(each["image_url"]["url"].split(",") for each in pictures), strict=True)
    assert set(kinds) == {"data:image/jpeg;base64"}
    assert [Image.open(io.BytesIO(base64.b64decode(content))).size for content in contents] == [(24, 16)] * 3
    captions, _ = read(source)
    assert sorted(captions) == [[f"caption {number}"] for number in range(COUNT)]
    assert annotator.summarize() == "500 tokens of prompts and 50 of captions"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("{frames} frames of {seconds:.1f} s", "3 frames of 1.0 s"),
        ("{frames:02d} of {seconds}, {{caption}}", "03 of 1, {caption}"),
        ("was: {caption:.3}", "was: a c"),
    ],
)
def test_formats_of_numbers_and_texts_are_those_of_the_prompt(server, source, prompt, text):
    annotator = make(server, prompt=prompt)
    assert annotate(source, annotator).failures == {}
    assert text in [body["messages"][0]["content"][-1]["text"] for _, body in server.requests]
    # Captions are computed again when those that the prompt holds change.
    assert annotator.reads_captions == ("a c" in text)


def test_several_columns_of_captions_live_next_to_each_other(server, source):
    annotate(source, make(server))
    server.answer = lambda number, body: complete("short")
    annotate(source, make(server, label="short"))
    assert read(source, "captions_short")[0] == [["short"]] * COUNT
    assert len(read(source)[0]) == COUNT


@pytest.mark.parametrize("failure", [fail(429, Retry_After="0.01"), fail(503), fail(500), (None, {}, b"{")])
def test_passing_failures_are_tried_again(server, source, failure):
    server.answer = lambda number, body: failure if number < 2 else complete("a caption")
    assert annotate(source, make(server)).failures == {}
    assert read(source)[0] == [["a caption"]] * COUNT
    assert len(server.requests) > COUNT


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (complete(None, refusal="I cannot help with that"), "refuses to answer.*cannot help"),
        (complete("", finish="content_filter"), "refuses to answer"),
        (complete("a long", finish="length"), "longer than max_tokens"),
        (complete("  "), "empty"),
        (fail(400, "the image is too large"), "400.*too large"),
        (fail(200, "<html>garbage</html>"), "no chat completion.*garbage"),
        (fail(200, '{"choices": []}'), "no chat completion"),
        (fail(200, '{"choices": [{"message": {"content": 7}}]}'), "no chat completion"),
        (fail(500, "crashed"), "500.*crashed"),
        ((None, {}, b"{"), "no answer"),
    ],
)
def test_a_clip_without_a_usable_answer_has_the_reason_and_others_follow(server, source, answer, reason):
    server.answer = lambda number, body: answer if "a cat" in str(body) else complete("a caption")
    report = annotate(source, make(server, prompt="{caption}"))
    assert list(report.failures) == ["0.mp4"]
    captions, errors = read(source)
    assert captions == [None, *[["a caption"]] * (COUNT - 1)]
    assert re.search(reason, errors[0])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (fail(401, "bad key"), r"401.*bad key.*key in OPENAI_API_KEY"),
        (fail(404, "no such model"), r"404.*no such model.*model=qwen"),
        (fail(302, Location="http://example.invalid/"), r"302.*[Cc]heck the address"),
        (fail(429, "slow down"), r"429.*slow down.*later"),
    ],
)
def test_what_is_wrong_for_all_clips_ends_the_run(server, source, answer, message):
    server.answer = lambda number, body: answer
    with pytest.raises(UserError, match=message):
        annotate(source, make(server))


def test_captions_before_an_end_are_kept(server, source):
    server.answer = lambda number, body: complete("a caption") if number < 3 else fail(401)
    with pytest.raises(UserError, match="401"):
        annotate(source, make(server))
    finished, server.answer = len(server.requests), lambda number, body: complete("a caption")
    report = annotate(source, make(server))
    assert 0 < report.computed <= COUNT - 1
    assert len(server.requests) - finished == report.computed
    assert read(source)[0] == [["a caption"]] * COUNT


@pytest.mark.nightly
def test_a_server_that_is_not_there_and_one_that_always_fails_end_the_run(server, tmp_path):
    contents = {f"{number}.png": make_clip(number, frames=2) for number in range(MAX_FAILURES + 4)}
    source = open_clips(tmp_path, contents)
    server.answer = lambda number, body: complete("")
    with pytest.raises(UserError, match=rf"{MAX_FAILURES} clips in a row.*empty.*[Cc]heck the server"):
        annotate(source, make(server))
    server.close()
    with pytest.raises(UserError, match=r"127\.0\.0\.1.*cannot be reached.*[Ss]tart the server"):
        annotate(source, make(server, label="other"))


def test_the_key_is_of_the_environment_and_sent_to_the_server_alone(server, source, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-key")
    chat = dataclasses.replace(make(server).server, key_variable="MY_KEY")
    annotator = dataclasses.replace(make(server), server=chat)
    annotate(source, annotator)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret-key"}
    server.answer = lambda number, body: fail(302, Location="http://127.0.0.1:1/")
    with pytest.raises(UserError) as caught:
        annotate(source, dataclasses.replace(annotator, label="other"))
    assert "secret-key" not in str(caught.value)
    assert "secret-key" not in annotator.identity


KEY = "sk-secret/key-of-0123456789"


@pytest.mark.parametrize("value", [f"{KEY}\r\n", f"{KEY}\n", f" {KEY} "])
def test_line_ends_and_spaces_around_the_key_are_not_sent(server, source, monkeypatch, value):
    monkeypatch.setenv("OPENAI_API_KEY", value)
    make(server).check()
    assert annotate(source, make(server)).failures == {}
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}


@pytest.mark.parametrize(
    "value", ["sk-first\nsecond", "sk-first\r\nX-Header: second", "sk-first\u2028second", "sk-\u20acsecond"]
)
def test_a_key_that_is_no_word_is_refused_without_being_shown(server, source, monkeypatch, value):
    monkeypatch.setenv("OPENAI_API_KEY", value)
    for run in (make(server).check, lambda: annotate(source, make(server)), lambda: ask(server)):
        with pytest.raises(
            UserError, match=r"OPENAI_API_KEY is invalid.*printable ASCII.*export OPENAI_API_KEY="
        ) as caught:
            run()
        assert not re.search("sk-|first|second", str(caught.value))
    assert not server.requests


def ask(server):
    return make(server).server.ask("a prompt", np.zeros((1, 8, 8, 3), np.uint8), max_tokens=9)


@pytest.mark.parametrize(
    "answer",
    [
        fail(400, f"Incorrect key: {KEY}"),
        fail(400, json.dumps({"error": KEY}).replace("/", "\\/")),
        fail(400, "x" * 190 + KEY),  # the reason is cut within it
        fail(401, f"Incorrect key: {KEY}"),
        fail(500, f"Bearer {KEY}"),
        fail(200, f"<html>{KEY}</html>"),
        fail(200, " " * 990 + KEY),
        complete(None, refusal=f"I cannot describe {KEY}"),
        complete(f"The key is {KEY}."),
    ],
)
def test_no_text_holds_a_key_that_the_server_repeats(server, source, monkeypatch, answer, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.answer = lambda number, body: answer
    with pytest.raises(UserError) as caught:
        ask(server)
    texts = ["".join(traceback.format_exception(caught.value))]
    with contextlib.suppress(UserError):  # 401 ends the run
        annotate(source, make(server))
        texts += [str(value) for values in read(source) for value in values]
        assert len(texts) == 1 + 2 * COUNT
    texts += [*capfd.readouterr()]
    for text in texts:
        assert "sk-secret" not in text
        assert "0123456789" not in text


@pytest.mark.parametrize("key", ["EMPTY", "a"])
def test_short_keys_of_servers_that_need_none_may_be_words_of_captions(server, source, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server.answer = lambda number, body: complete("a sign says EMPTY")
    annotate(source, make(server))
    assert read(source)[0] == [["a sign says EMPTY"]] * COUNT


@pytest.mark.parametrize(
    "answer",
    [
        complete("a long", finish="length"),
        complete(None, refusal="no"),
        complete("", finish="content_filter"),
        complete("  "),
    ],
)
def test_the_cost_of_answers_that_are_not_used_counts(server, source, answer):
    server.answer = lambda number, body: answer
    annotator = make(server, input_price=10.0, output_price=100.0)
    assert len(annotate(source, annotator).failures) == COUNT
    assert annotator.summarize() == "500 tokens of prompts and 50 of captions: 0.01"


def test_answers_without_counts_of_tokens_are_used(server, source):
    choices = [{"message": {"content": "a caption"}}]
    usages = [{}, {"usage": None}, {"usage": 7}, {"usage": {"prompt_tokens": "many"}}, {"usage": {"prompt_tokens": 3}}]
    server.answer = lambda number, body: (200, {}, json.dumps({"choices": choices, **usages[number]}).encode())
    annotator = make(server)
    assert annotate(source, annotator).failures == {}
    assert annotator.summarize() == "3 tokens of prompts and 0 of captions"


def test_a_paid_server_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(MissingError, match=r"api\.openai\.com.*export OPENAI_API_KEY="):
        ChatServer(url="https://api.openai.com/v1", model="gpt").check()
    ChatServer(model="local").check()
    with pytest.raises(UserError, match=r"model=''.*/models"):
        ChatServer().check()
    with pytest.raises(UserError, match=r"url=ftp://x.*http://localhost"):
        ChatServer(url="ftp://x", model="m")


def test_costs_are_estimated_from_frames_and_prices(server, source):
    free = make(server).estimate_cost(source.infos)
    assert free.price == 0.0  # it runs on this machine
    priced = make(server, input_price=10.0, output_price=100.0).estimate_cost(source.infos)
    assert priced.price > COUNT * 400 * 100 / 1e6
    assert f"{priced.price:.2f}" in priced.text
    far = dataclasses.replace(make(server), server=ChatServer(url="https://api.openai.com/v1", model="gpt"))
    assert far.estimate_cost(source.infos).price is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "Long Ones"}, r"label='Long Ones'.*a-z|label='Long Ones'.*letters"),
        ({"prompt": "{clip}"}, r"\{clip\}.*\{frames\}, \{seconds\}, \{caption\}"),
        ({"prompt": "{"}, r"prompt='\{'.*twice"),
        ({"prompt": "{seconds:d}"}, r"prompt='\{seconds:d\}'.*\{seconds:\.1f\}"),
        ({"prompt": "{caption:.1f}"}, r"prompt='\{caption:\.1f\}'.*\{seconds:\.1f\}"),
        ({"prompt": "{seconds:{width}}"}, r"prompt=.*width.*\{seconds:\.1f\}"),
        ({"prompt": "{frames!x}"}, r"prompt='\{frames!x\}'.*\{seconds:\.1f\}"),
        ({"frames": 0}, "frames=0"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        Captions(**options)
