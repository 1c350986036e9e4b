import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

from dit_video.core.errors import MissingError, UserError
from dit_video.models.encoders import PretrainedTokenizer, clean, has_tokenizer
from support import tiny_clip
from support.tiny_t5 import WORDS, write_tokenizer

REAL = Path(__file__).resolve().parents[4] / "shared" / "tokenizers"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the shared tokenizers are not here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def test_a_text_becomes_the_ids_of_its_words_and_an_end(folder):
    tokenizer = PretrainedTokenizer(folder, max_tokens=8)
    ids = tokenizer("a red  ball\n")
    assert ids.dtype == np.int32
    assert ids[-1] == 1
    assert len(ids) == 5  # "▁", "a", "▁red", "▁ball"
    words = [tokenizer(word) for word in WORDS if len(word) > 1]
    assert all(len(word) == 2 for word in words)
    assert len({int(word[0]) for word in words}) == len(words)
    assert tokenizer("").tolist() == [1]
    assert tokenizer.max_id == 3 + len(words) + 26


def write_umt5_tokenizer(folder):
    """Write a tokenizer as UMT5's: no map of characters, and `<s>` at 2, where T5 has `<unk>`, which is at 3."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("▁ball", -2.0)]
    pieces += [(letter, -8.0) for letter in "abl"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([name for name, score in pieces if score == 0])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5TokenizerFast", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_unknown_characters_have_the_id_that_the_file_gives_them(tmp_path):
    write_umt5_tokenizer(tmp_path)
    tokenizer = PretrainedTokenizer(tmp_path, max_tokens=99)
    original = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    original.no_truncation()
    original.no_padding()
    assert tokenizer("ball 😀").tolist() == original.encode("ball 😀").ids == [5, 4, 3, 1]
    # Truncation and padding are ours, whatever the file says of them.
    assert tokenizer("ball ball ball ball ball").tolist() == [5] * 5 + [1]
    with pytest.warns(UserWarning, match="a text of 6 tokens is cut to 3"):
        assert PretrainedTokenizer(tmp_path, max_tokens=3)("ball ball ball ball ball").tolist() == [5, 5, 1]


def test_the_identity_is_that_of_the_tokenizer_that_transformers_reads(folder, tmp_path):
    """Caches are stamped with it; both ways of reading give the same for files that transformers wrote."""
    for source in (folder, tmp_path):
        if source is tmp_path:
            tiny_clip.write_tokenizer(source)
        theirs = transformers.AutoTokenizer.from_pretrained(source)
        theirs("")
        expected = hashlib.sha256(theirs.backend_tokenizer.to_str().encode()).hexdigest()
        assert PretrainedTokenizer(source, max_tokens=12).identity == expected


def test_a_long_text_is_cut_still_ends_and_is_warned_of(folder):
    tokenizer, whole = PretrainedTokenizer(folder, max_tokens=4), PretrainedTokenizer(folder, max_tokens=99)
    text = "red ball moves left"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(tokenizer("red ball moves")) == 4
        assert len(whole(text)) == 5
    with pytest.warns(UserWarning, match="a text of 5 tokens is cut to 4: 'red ball moves left'") as caught:
        ids = tokenizer(text)
    assert len(caught) == 1
    assert ids.tolist() == [*whole(text)[:3], 1]
    assert len(whole(text)) == 5  # a cut leaves no trace in the tokenizer
    assert len(tokenizer("red")) == 2


def test_the_identity_of_a_tokenizer_follows_its_rules(folder, tmp_path):
    first = PretrainedTokenizer(folder, max_tokens=8)
    with pytest.warns(UserWarning, match="is cut to 8"):
        first("red " * 20)
    assert PretrainedTokenizer(folder, max_tokens=99).identity == first.identity
    changed = tmp_path / "tokenizer.json"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    assert PretrainedTokenizer(tmp_path, max_tokens=8).identity == first.identity
    changed.write_text(changed.read_text().replace("▁ball", "▁bowl"))
    assert PretrainedTokenizer(tmp_path, max_tokens=8).identity != first.identity


def test_absent_and_damaged_tokenizers_are_refused(folder, tmp_path):
    assert has_tokenizer(folder)
    assert not has_tokenizer(tmp_path)
    with pytest.raises(
        MissingError, match=r"no tokenizer in .* \(tokenizer.json, spiece.model, or vocab.json and merges.txt\)"
    ):
        PretrainedTokenizer(tmp_path, max_tokens=8)
    for name, content in (("tokenizer.json", "{"), ("spiece.model", "nothing")):
        bad = tmp_path / name[:3]
        bad.mkdir()
        (bad / name).write_text(content)
        (bad / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
        with pytest.raises(UserError, match=r"can't read the tokenizer|pip install sentencepiece") as caught:
            PretrainedTokenizer(bad, max_tokens=8)
        assert "\n" not in str(caught.value)
    whole = json.loads((folder / "tokenizer.json").read_text())
    endless = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole | {"post_processor": None}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(endless))
    with pytest.raises(UserError, match="adds no end token"):
        PretrainedTokenizer(tmp_path, max_tokens=8)
    with pytest.raises(UserError, match=r"max_tokens=1 .*2 or more"):
        PretrainedTokenizer(folder, max_tokens=1)


@needs_real
def test_the_real_t5_vocabulary_gives_the_ids_of_the_paper():
    tokenizer = PretrainedTokenizer(REAL / "t5", max_tokens=512)
    # Ids of the tokenizer of the T5 paper.
    assert tokenizer("Studies have been shown that owning a dog is good for you").tolist() == [
        *(6536, 43, 118, 2008, 24, 293, 53, 3, 9, 1782, 19, 207, 21, 25),
        1,
    ]
    assert tokenizer.max_id == 32099


@needs_real
def test_the_real_t5_vocabulary_gives_the_ids_of_transformers():
    tokenizer = PretrainedTokenizer(REAL / "t5", max_tokens=512)
    theirs = transformers.AutoTokenizer.from_pretrained(REAL / "t5")
    texts = [
        "",
        "a red ball",
        "  two  spaces \t",
        "an émigré’s café, ½ full",
        "😀 字 and <extra_id_0>",
        "ends</s> early",
    ]
    assert [tokenizer(text).tolist() for text in texts] == theirs(texts)["input_ids"]


@needs_real
def test_the_real_clip_vocabulary_gives_the_ids_of_openai():
    tokenizer = PretrainedTokenizer(REAL / "clip", max_tokens=77)
    # Ids of the original tokenizer of CLIP.
    assert tokenizer("A photo  of a CAT").tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("hello world!").tolist() == [49406, 3306, 1002, 256, 49407]
    assert tokenizer("").tolist() == [49406, 49407]
    assert tokenizer.max_id == 49407
    with pytest.warns(UserWarning, match="a text of 102 tokens is cut to 77: 'dog dog") as caught:
        ids = tokenizer("dog " * 100)
    assert len(caught) == 1
    assert ids.tolist() == [49406, *[1929] * 75, 49407]


def test_a_vocabulary_and_its_merges_are_read_from_two_files(tmp_path):
    tiny_clip.write_tokenizer(tmp_path)
    tokenizer = PretrainedTokenizer(tmp_path, max_tokens=12)
    start, end = tiny_clip.START, tiny_clip.END
    assert tokenizer("").tolist() == [start, end]
    words = [tokenizer(word).tolist() for word in tiny_clip.WORDS]
    assert all(len(ids) == 3 and ids[0] == start and ids[2] == end for ids in words)
    assert len({ids[1] for ids in words}) == len(words)
    assert tokenizer("Red  ab").tolist() == [start, words[0][1], 0, 27, end]  # "a", and "b" as the last letter
    (tmp_path / "merges.txt").unlink()
    assert not has_tokenizer(tmp_path)
    with pytest.raises(MissingError, match="no tokenizer in"):
        PretrainedTokenizer(tmp_path, max_tokens=12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a\n\n red\tball ", "a red ball"),
        ("a &amp;lt; b", "a < b"),
        ("&quot;hi&quot;", '"hi"'),
        ("a&nbsp;&nbsp;b", "a b"),
        ("a\u3000b\u2028c", "a b c"),
        ("", ""),
    ],
)
def test_cleaning_unescapes_html_and_joins_whitespace(text, expected):
    assert clean(text) == expected


def test_mojibake_is_repaired_as_in_diffusers():
    pytest.importorskip("ftfy")
    assert clean("itâ€™s a cafÃ©") == "it's a café"


def test_texts_that_ftfy_may_change_ask_for_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"ftfy is not installed: .*'a  café'.*pip install 'dit_video\[wan\]'"):
        assert clean("a  café") == "a café"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clean("a  red &amp; green ball") == "a red & green ball"
