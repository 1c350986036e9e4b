"""The page of pairs in headless Chromium: votes by keys and clicks, a reload half-way, the exported file, results."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dit_video.curation.raters import PageOptions, get_key_path, load_default_prompt_domains, write_page
from dit_video.curation.raters.votes import TIE, PageKey
from support.chromium import open_chromium
from support.sample_folders import write_sample_folder

pytest.importorskip("playwright")
pytestmark = pytest.mark.slow

PROMPTS = load_default_prompt_domains().make_prompts(1)[:4]
SYSTEMS = ("walrus", "heron", "ocelot")
KEYS = {"left": "ArrowLeft", "tie": "ArrowDown", "right": "ArrowRight"}


@pytest.fixture(scope="module")
def browser():
    """Return headless Chromium."""
    with open_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page_folder(tmp_path_factory) -> Path:
    """Return a page of two systems with two controls; one prompt's samples are images."""
    root = tmp_path_factory.mktemp("page")
    folders = {
        name: write_sample_folder(root / name, PROMPTS, shade=shade, frames=frames, images=PROMPTS[3:])
        for name, shade, frames in (("walrus", 60, 6), ("ocelot", 160, 12))
    }
    write_page(folders, root / "comparison", options=PageOptions(controls=0.4))
    return root / "comparison"


@pytest.fixture(scope="module")
def drawn_folder(tmp_path_factory) -> Path:
    """Return a page of three systems, of whose 12 comparisons each rater sees 4, with 2 of 6 controls."""
    root = tmp_path_factory.mktemp("drawn")
    folders = {name: write_sample_folder(root / name, PROMPTS, shade=60, images=PROMPTS) for name in SYSTEMS}
    write_page(folders, root / "comparison", options=PageOptions(controls=0.4, pairs_per_rater=4))
    return root / "comparison"


class Rater:
    """A rater who follows planted preferences, as the key says which side is whose."""

    def __init__(self, browser, folder, name):
        self.key = PageKey.read(get_key_path(folder))
        self.context = browser.new_context(viewport={"width": 1280, "height": 800})
        self.page = self.context.new_page()
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto((folder / "index.html").as_uri())
        self.page.fill("#rater", name)
        self.page.click("text=Start")

    def wait(self):
        """Wait until the pair is loaded, and return it with the ids of its sides."""
        self.page.wait_for_function("!document.querySelector('.question button').disabled")
        ids = [Path(self.page.get_attribute(f"#{side} > *", "src")).stem for side in ("left", "right")]
        return next(pair for pair in self.key.pairs if {*pair.sides} == {*ids}), ids

    def choose(self, question, *, is_careful=True):
        """Return left, right or tie: walrus follows prompts, ocelot looks better, and of images both look equal."""
        pair, ids = self.wait()
        if pair.control is not None:
            side = pair.control.right if is_careful else next(s for s in pair.sides if s != pair.control.right)
        elif question == "look" and pair.prompt == PROMPTS[3]:
            return "tie"
        else:
            order = SYSTEMS if question == "prompt" else SYSTEMS[::-1]
            side = pair.sides[pair.systems.index(min(pair.systems, key=order.index))]
        return ("left", "right")[ids.index(side)]

    def vote(self, *, by="keys", **options):
        """Answer both questions of the pair, and go on."""
        for question in ("prompt", "look"):
            choice = self.choose(question, **options)
            if by == "keys":
                self.page.keyboard.press(KEYS[choice])
            else:
                self.page.click(f"[data-question={question}] [data-choice={choice}]")
        if by == "keys":
            self.page.keyboard.press("Enter")
        else:
            self.page.click("#next")

    def export(self, path):
        """Save the file of votes."""
        with self.page.expect_download() as download:
            self.page.click(".export:visible")
        download.value.save_as(path)
        assert self.errors == []
        self.context.close()
        return json.loads(path.read_text())

    def get_number(self):
        return self.page.inner_text("#number")


def test_planted_preferences_are_recovered_after_a_reload_half_way(browser, page_folder, tmp_path, script):
    ada = Rater(browser, page_folder, "Ada  Lovelace")
    assert ada.get_number() == "1 of 6"
    for number in range(3):
        ada.vote(by="clicks" if number % 2 else "keys")
    ada.page.reload()
    ada.wait()
    assert ada.get_number() == "4 of 6"
    assert ada.page.get_attribute(".progress", "aria-valuenow") == "3"
    for _ in range(3):
        ada.vote()
    ada.page.wait_for_selector("#end:visible")
    ada.page.reload()
    assert "all 6 pairs" in ada.page.inner_text("#end-text")
    votes = ada.export(tmp_path / "votes-ada.json")
    assert votes["rater"] == "Ada Lovelace"
    assert all(vote["seconds"] >= 0 and vote["time"] for vote in votes["votes"])

    bo = Rater(browser, page_folder, "Bo")
    for _ in range(6):
        bo.vote(is_careful=False)
    other = bo.export(tmp_path / "votes-bo.json")
    controls = {pair.name for pair in PageKey.read(get_key_path(page_folder)).pairs if pair.control is not None}
    ada_pairs, bo_pairs = ({vote["pair"] for vote in each["votes"]} for each in (votes, other))
    assert ada_pairs - controls == bo_pairs - controls
    assert len(ada_pairs & controls) == len(bo_pairs & controls) == 2 < len(controls)

    out = tmp_path / "results.json"
    done = script(
        "tools/side_by_side_results.py", get_key_path(page_folder), *tmp_path.glob("votes-*.json"), "--out", out
    )
    assert done.code == 0, done.err
    assert "excluded: 2 of 2 control questions failed" in done.out
    results = json.loads(out.read_text())
    assert {name: each["is_excluded"] for name, each in results["raters"].items()} == {
        "Ada Lovelace": False,
        "Bo": True,
    }
    prompt, look = (results["questions"][name]["win_rates"][0] for name in ("prompt", "look"))
    assert (prompt["system"], prompt["wins"], prompt["ties"], prompt["losses"]) == ("walrus", 4, 0, 0)
    assert (look["system"], look["wins"], look["ties"], look["losses"]) == ("walrus", 0, 1, 3)


def test_order_and_sides_differ_by_rater_and_not_by_visit(browser, page_folder):
    orders = []  # drawn anew by each run, as the ids depend on the folders: three raters are never alike by chance
    for name in ("Ada", "Bo", "Cleo", "ada"):
        rater = Rater(browser, page_folder, name)
        order = []
        for _ in range(3):
            order.append(tuple(rater.wait()[1]))
            rater.vote()
        orders.append(order)
        rater.context.close()
    assert orders[0] == orders[-1]
    assert len({tuple(order) for order in orders}) > 1
    assert len({tuple(frozenset(sides) for sides in order) for order in orders}) > 1


def test_each_rater_draws_some_pairs_and_all_are_equally_likely(browser, drawn_folder):
    key = PageKey.read(get_key_path(drawn_folder))
    rater = Rater(browser, drawn_folder, "Ada")
    assert rater.get_number() == "1 of 6"
    names = [f"rater {number}" for number in range(3000)]
    draws = rater.page.evaluate(
        """(names) => {
            const data = JSON.parse(document.getElementById("data").textContent);
            return names.map((name) => pairDraws.draw(data.draws, `${data.page}:${name}`));
        }""",
        names,
    )
    drawn = [[key.pairs[each["number"]] for each in draw] for draw in draws]
    assert len({tuple(pair.name for pair in pairs) for pairs in drawn}) > 2900
    for pairs in drawn:
        assert len({pair.name for pair in pairs}) == 6
        systems = Counter(frozenset(pair.systems) for pair in pairs if pair.control is None)
        assert sorted(systems.values()) == [1, 1, 2]
        assert {pair.control.kind for pair in pairs if pair.control is not None} == {"degraded", "other_prompt"}
    counts = Counter(pair.name for pairs in drawn for pair in pairs)
    controls = [counts[pair.name] for pair in key.pairs if pair.control is not None]
    comparisons = [counts[pair.name] for pair in key.pairs if pair.control is None]
    assert (len(comparisons), len(controls)) == (12, 6)
    # 4 of 12 comparisons and 2 of 6 controls are each drawn for a third of the raters, within four standard deviations.
    np.testing.assert_allclose([*comparisons, *controls], 1000, atol=4 * (3000 * 2 / 9) ** 0.5)
    lefts = sum(each["isFirstLeft"] for draw in draws for each in draw)
    assert abs(lefts - 9000) < 4 * (18000 / 4) ** 0.5
    firsts = Counter(pairs[0].control is None for pairs in drawn)
    assert abs(firsts[True] - 2000) < 4 * (3000 * 2 / 9) ** 0.5
    rater.context.close()


def test_a_rater_sees_the_same_pairs_after_a_reload_and_another_one_others(browser, drawn_folder, tmp_path):
    seen = []
    for name in ("Ada", "Bo", "Ada"):
        rater = Rater(browser, drawn_folder, name)
        for number in range(6):
            rater.vote()
            if number == 2:
                rater.page.reload()
        rater.page.wait_for_selector("#end:visible")
        assert "all 6 pairs" in rater.page.inner_text("#end-text")
        seen.append({vote["pair"] for vote in rater.export(tmp_path / "votes.json")["votes"]})
    assert seen[0] == seen[2] != seen[1]
    assert len(seen[0]) == 6


def test_answers_can_be_changed_and_an_unfinished_file_saved(browser, page_folder, tmp_path):
    rater = Rater(browser, page_folder, "Cy")
    pair, ids = rater.wait()
    assert rater.page.is_disabled("#next")
    rater.page.keyboard.press("Enter")  # has no effect on an unanswered pair
    rater.page.keyboard.press("ArrowLeft")
    rater.page.keyboard.press("ArrowLeft")
    rater.page.keyboard.press("ArrowUp")
    rater.page.keyboard.press("ArrowDown")
    rater.page.keyboard.press("Enter")
    rater.wait()
    assert rater.get_number() == "2 of 6"
    rater.page.keyboard.press("Backspace")
    assert rater.wait()[0] == pair
    rater.page.click("[data-question=prompt] [data-choice=right]")
    votes = rater.export(tmp_path / "votes.json")["votes"]
    assert [(vote["pair"], vote["left"], vote["prompt"], vote["look"]) for vote in votes] == [
        (pair.name, ids[0], ids[1], TIE)
    ]


def test_clips_of_different_lengths_play_in_step_and_start_again_together(browser, page_folder):
    rater = Rater(browser, page_folder, "Di")
    while len(rater.page.query_selector_all(".media video")) < 2:
        rater.vote()
        rater.wait()
    times = "[...document.querySelectorAll('.media video')].map((each) => each.currentTime)"
    # The longer clip lasts 3/4 s: it has started again after the time of three clips only if it loops.
    rater.page.wait_for_function(
        f"(() => {{ const t = {times}; window.peak = Math.max(window.peak ?? 0, ...t); "
        "return window.peak > 0.3 && Math.max(...t) < 0.2; })()",
        polling=20,
    )
    first, second = rater.page.evaluate(times)
    assert abs(first - second) < 0.15
    rater.page.keyboard.press("Space")
    assert rater.page.evaluate("[...document.querySelectorAll('.media video')].every((each) => each.paused)")
    rater.context.close()


def test_a_missing_file_is_reported_and_the_pair_can_be_left_out(browser, page_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(page_folder, copy)
    shutil.copy(get_key_path(page_folder), get_key_path(copy))
    for path in (copy / "media").iterdir():
        path.unlink()
    rater = Rater(browser, copy, "Ed")
    rater.page.wait_for_selector("#failure:visible")
    rater.page.keyboard.press("Enter")
    rater.page.wait_for_function("document.getElementById('number').textContent === '2 of 6'")
    assert rater.export(tmp_path / "votes.json")["votes"] == []
