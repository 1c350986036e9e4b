"""The page of pairs: its files, its key, and how a rater uses it in a browser."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.curation.raters import PageOptions, get_key_path, load_default_prompt_domains, name_systems, write_page
from dit_video.curation.raters.samples import copy_sample, degrade, read_sample_sets
from dit_video.curation.raters.votes import PageKey
from dit_video.video import Clip, decode, read_recipe
from support.sample_folders import SECRET, write_sample_folder

DOMAINS = load_default_prompt_domains()
PROMPTS = DOMAINS.make_prompts(1)[:4]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Return the folders of samples of three systems; the last prompt's sample is an image."""
    root = tmp_path_factory.mktemp("samples")
    return {
        name: write_sample_folder(root / name, PROMPTS, shade=40 + 60 * number, frames=8 + number, images=PROMPTS[3:])
        for number, name in enumerate(("walrus", "ocelot", "heron"))
    }


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory) -> tuple[Path, PageKey]:
    """Return the page of these systems and its key."""
    out = tmp_path_factory.mktemp("page") / "comparison"
    return out, write_page(folders, out, options=PageOptions(controls=0.3, seed=3))


def read_media(out, side):
    (path,) = (out / "media").glob(f"{side}.*")
    return decode(path).frames


def test_every_pair_of_systems_is_compared_on_every_prompt(page):
    compared = [(pair.prompt, frozenset(pair.systems)) for pair in page[1].pairs if pair.control is None]
    pairs = map(frozenset, itertools.combinations(("walrus", "ocelot", "heron"), 2))
    assert Counter(compared) == Counter(itertools.product(PROMPTS, pairs))
    assert {pair.domain for pair in page[1].pairs} == {DOMAINS.find_domain(prompt) for prompt in PROMPTS}


def test_the_key_names_the_system_of_each_side(page, folders):
    out, key = page
    samples = {each.prompt: each.files for each in read_sample_sets(folders)}
    for pair in key.pairs:
        if pair.control is None:
            for side, system in zip(pair.sides, pair.systems, strict=True):
                expected = decode(samples[pair.prompt][system]).frames
                np.testing.assert_array_equal(read_media(out, side), expected)
    assert PageKey.read(get_key_path(out)) == key
    assert get_key_path(out).parent == out.parent


def test_the_page_says_nothing_about_systems_domains_or_controls(page, folders):
    out, key = page
    text = (out / "index.html").read_text()
    data = text[text.index('id="data"') : text.index("</script>")]
    words = (*folders, *map(str, folders.values()), *(pair.domain for pair in key.pairs), "degraded", "other_prompt")
    assert [word for word in words if f'"{word}"' in data] == []
    key_text = get_key_path(out).read_text()
    assert all(word in key_text for word in (*folders, "degraded", "other_prompt"))
    for path in (out / "media").iterdir():
        assert SECRET.encode() not in path.read_bytes()
        assert read_recipe(path) == {}
        assert decode(path).caption == ""
        assert path.stem in data
    names = [side for pair in key.pairs for side in (*pair.sides, pair.name)]
    assert len(set(names)) == len(names)


def test_systems_are_on_either_side_and_in_any_order(folders, tmp_path):
    key = write_page(folders, tmp_path / "page", options=PageOptions(controls=0))
    firsts = Counter(pair.systems[0] for pair in key.pairs)
    assert len(firsts) == 3
    assert [pair.item for pair in key.pairs] != sorted(pair.item for pair in key.pairs)


def test_a_page_depends_on_its_seed_and_its_samples_alone(folders, page, tmp_path):
    _, key = page
    assert write_page(folders, tmp_path / "same", options=PageOptions(controls=0.3, seed=3)) == key
    other = write_page(folders, tmp_path / "other", options=PageOptions(controls=0.3, seed=4))
    assert other.page != key.page
    fewer = dict(list(folders.items())[:2])
    assert write_page(fewer, tmp_path / "fewer", options=PageOptions(seed=3)).page != key.page


def test_controls_have_the_share_and_right_answers(page, folders):
    out, key = page
    samples = {each.prompt: each.files for each in read_sample_sets(folders)}
    controls = [pair for pair in key.pairs if pair.control is not None]
    assert len(controls) == 3 * key.controls_per_rater == 3 * math.ceil(0.3 * 12)
    assert len({(pair.item, pair.systems, pair.control.kind) for pair in controls}) == len(controls)
    assert {pair.control.kind for pair in controls} == {"degraded", "other_prompt"}
    for pair in controls:
        wrong = next(side for side in pair.sides if side != pair.control.right)
        original = decode(samples[pair.prompt][pair.systems[0]]).frames
        np.testing.assert_array_equal(read_media(out, pair.control.right), original)
        if pair.control.kind == "degraded":
            assert pair.control.question == "look"
            difference = read_media(out, wrong).astype(float) - original
            assert np.abs(difference).mean(axis=(0, 1, 2, 3)) > 8
        else:
            assert pair.control.question == "prompt"
            others = [decode(samples[prompt][pair.systems[0]]).frames for prompt in PROMPTS if prompt != pair.prompt]
            assert any(np.array_equal(read_media(out, wrong), other) for other in others)


def test_a_degraded_copy_is_random_by_its_seed_and_keeps_its_size():
    clip = Clip(frames=np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3), np.uint8), fps=8.0)
    copy = degrade(clip, seed=1)
    assert copy.frames.shape == clip.frames.shape
    assert copy.fps == 8.0
    np.testing.assert_array_equal(copy.frames, degrade(clip, seed=1).frames)
    assert (copy.frames != degrade(clip, seed=2).frames).any()


def test_a_copy_keeps_pixels_and_rate(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 32, 48, 3), np.uint8)
    for suffix in ("mp4", "webm"):
        Clip(frames=pixels, fps=12.0, recipe={"weights": SECRET}).save(tmp_path / f"a.{suffix}")
        copy_sample(tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}")
        before, after = decode(tmp_path / f"a.{suffix}"), decode(tmp_path / f"b.{suffix}")
        np.testing.assert_array_equal(before.frames, after.frames)
        # The header of webm has no exact rate; its frames keep their times.
        assert after.fps == pytest.approx(12.0, rel=0.0 if suffix == "mp4" else 0.002)
        assert b"Lavf6" not in (tmp_path / f"b.{suffix}").read_bytes()
        assert SECRET.encode() in (tmp_path / f"a.{suffix}").read_bytes()
        assert SECRET.encode() not in (tmp_path / f"b.{suffix}").read_bytes()
    (tmp_path / "c.mp4").write_bytes(b"no video")
    with pytest.raises(DecodeError, match=r"c\.mp4"):
        copy_sample(tmp_path / "c.mp4", tmp_path / "d.mp4")


def test_repeated_prompts_are_matched_in_their_order(tmp_path):
    for name in "ab":
        write_sample_folder(tmp_path / name, ["a cat", "a dog", "a cat"])
    sets = read_sample_sets({name: tmp_path / name for name in "ab"})
    files = [(each.prompt, each.files["a"].name, each.files["b"].name) for each in sets]
    expected = [("a cat", 0), ("a dog", 1), ("a cat", 2)]
    assert files == [(prompt, *[f"{number:03d}-sample.mp4"] * 2) for prompt, number in expected]


def test_prompts_that_do_not_match_are_named(tmp_path):
    write_sample_folder(tmp_path / "a", ["a cat", "a dog"])
    write_sample_folder(tmp_path / "b", ["a cat", "a hen", "a dog"])
    write_sample_folder(tmp_path / "c", ["a cat", "a dog", "a dog"])
    for name, prompt in (("b", "a hen"), ("c", "a dog")):
        for names in (f"a{name}", f"{name}a"):
            with pytest.raises(UserError, match=f"/a is invalid: '{prompt}' of .*/{name} has no match.*one list"):
                write_page({each: tmp_path / each for each in names}, tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_damaged_folders_are_errors_that_name_the_file(tmp_path):
    good = write_sample_folder(tmp_path / "good", ["a cat"])
    bad = tmp_path / "bad"
    bad.mkdir()
    with pytest.raises(MissingError, match=r"bad/prompts\.json"):
        read_sample_sets({"a": good, "b": bad})
    for text, match in (
        ("[", "not valid JSON"),
        ("[]", "no list"),
        ("[7]", "entry 0"),
        ('[{"prompt": ""}]', "entry 0"),
    ):
        (bad / "prompts.json").write_text(text)
        with pytest.raises(UserError, match=rf"bad/prompts\.json.*{match}"):
            read_sample_sets({"a": good, "b": bad})
    for name, match in (("a.mp4", r"no such file.*a\.mp4"), ("a.exe", r"file='a\.exe'.*\.mp4")):
        (bad / "prompts.json").write_text(json.dumps([{"prompt": "a cat", "file": name}]))
        with pytest.raises(UserError, match=match):
            read_sample_sets({"a": good, "b": bad})


def test_a_page_is_never_replaced(page, folders):
    out, _ = page
    with pytest.raises(UserError, match="it exists"):
        write_page(folders, out)


def test_a_rater_can_see_no_more_pairs_than_there_are(folders, tmp_path):
    with pytest.raises(UserError, match=r"pairs_per_rater=13 is invalid.*12 comparisons"):
        write_page(folders, tmp_path / "page", options=PageOptions(pairs_per_rater=13))
    key = write_page(folders, tmp_path / "page", options=PageOptions(pairs_per_rater=5, controls=0.2))
    assert (key.comparisons_per_rater, key.controls_per_rater) == (5, 1)
    assert sum(pair.control is None for pair in key.pairs) == 12
    assert sum(pair.control is not None for pair in key.pairs) == 3


INVALID_OPTIONS = [{"seed": -1}, {"controls": -0.1}, {"controls": 0.5}, {"control_sets": 0}, {"pairs_per_rater": 0}]


@pytest.mark.parametrize("values", INVALID_OPTIONS)
def test_invalid_options_are_errors(values):
    with pytest.raises(UserError, match=f"{next(iter(values))}=.*Use"):
        PageOptions(**values)


def test_systems_are_named_by_their_folders_or_as_stated(tmp_path):
    assert [*name_systems([tmp_path / "a", tmp_path / "b"])] == ["a", "b"]
    assert [*name_systems([tmp_path / "a" / "x", tmp_path / "b" / "x"])] == [f"{tmp_path}/a/x", f"{tmp_path}/b/x"]
    assert [*name_systems([tmp_path / "a", tmp_path / "b"], ["old", "new"])] == ["old", "new"]
    for folders, names, match in (
        ("a", (), "two folders"),
        ("ab", ("x",), "2 folders"),
        ("ab", "xx", "have that name"),
    ):
        with pytest.raises(UserError, match=match):
            name_systems([tmp_path / folder for folder in folders], names)
