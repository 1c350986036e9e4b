"""Names of emoji, their parts, and which pairs of parts are held out."""

from collections import Counter

import pytest

from dit_video.emoji.names import LANGUAGES, TONES, EmojiName, choose_held_out, read_names

emoji = pytest.importorskip("emoji")
FIREFIGHTERS = {"1f9d1": "person", "1f468": "man", "1f469": "woman"}


def make_stems():
    """Return the stems of all emoji of the package that are fully qualified."""
    characters = (one for one, entry in emoji.EMOJI_DATA.items() if entry["status"] == emoji.STATUS["fully_qualified"])
    return ["-".join(f"{ord(character):04x}" for character in one) for one in characters]


def test_a_name_has_its_parts():
    stems = [f"{person}{tone}-200d-1f692" for person in FIREFIGHTERS for tone in ("", "-1f3fd")]
    names, unknown = read_names([*stems, "0023-fe0f-20e3", "1f600"])
    assert not unknown
    woman = names["1f469-1f3fd-200d-1f692"]
    assert woman.text == "woman firefighter: medium skin tone"
    assert (woman.base, woman.tone, woman.person, woman.role) == ("woman firefighter", "medium", "woman", "firefighter")
    neutral = names["1f9d1-200d-1f692"]
    assert (neutral.text, neutral.person, neutral.role) == ("firefighter", "person", "firefighter")
    assert names["0023-fe0f-20e3"].text == "keycap #"
    assert names["1f600"] == EmojiName("grinning face", translations=names["1f600"].translations)
    assert names["1f600"].translations["de"] == "grinsendes gesicht"


def test_a_person_without_another_one_in_the_same_role_is_no_part():
    names, _ = read_names(["1f469-200d-1f692"])
    assert names["1f469-200d-1f692"] == EmojiName(
        "woman firefighter", translations=names["1f469-200d-1f692"].translations
    )


def test_the_variation_selector_makes_no_difference():
    for stem in ("2764-fe0f", "2764"):
        assert read_names([stem]).names[stem].text == "red heart"


@pytest.mark.parametrize("stem", ["1f3f4-e0067_e0062_e0065_e006e_e0067", "readme", "110000000", ""])
def test_a_file_without_a_name_is_unknown(stem):
    assert read_names([stem, "1f600"]).unknown == (stem,)


def test_all_emoji_have_names_in_all_languages():
    names, unknown = read_names(make_stems())
    assert not unknown
    assert all(set(name.translations) == set(LANGUAGES[1:]) for name in names.values())
    assert {name.tone for name in names.values()} == {"", *TONES}


@pytest.fixture(scope="module")
def names():
    return read_names(make_stems()).names


def test_a_tenth_of_the_pairs_is_held_out_whole(names):
    kinds = choose_held_out(names, 0)
    assert set(kinds.values()) == {"tone", "person"}
    held_out = [names[stem] for stem in kinds]
    training = [name for stem, name in names.items() if stem not in kinds]
    tones = {(name.base, name.tone) for name in names.values() if name.tone}
    persons = {(name.role, name.person) for name in names.values() if name.role}
    held_tones = {(names[stem].base, names[stem].tone) for stem, kind in kinds.items() if kind == "tone"}
    held_persons = {(names[stem].role, names[stem].person) for stem, kind in kinds.items() if kind == "person"}
    assert len(held_persons) == round(len(persons) / 10)
    assert 0.9 * len(tones) / 10 <= len(held_tones) <= len(tones) / 10  # some are of held-out persons
    assert not {(name.role, name.person) for name in training} & held_persons
    assert not {(name.base, name.tone) for name in training} & held_tones
    for part in ("role", "tone", "person"):  # each is in clips that are trained on
        assert {getattr(name, part) for name in held_out} <= {getattr(name, part) for name in training}
    kept = Counter(name.base for name in training if name.tone)
    assert all(kept[base] >= 2 for base, _ in held_tones)


def test_what_is_held_out_follows_from_the_seed(names):
    assert choose_held_out(names, 0) == choose_held_out(dict(reversed(names.items())), 0)
    assert choose_held_out(names, 0) != choose_held_out(names, 1)
