"""The commands of the comparison by people, as a user starts them."""

import json

from dit_video.curation.raters import PageKey, load_default_prompt_domains
from dit_video.sampling.tasks.task_file import read_entries
from dit_video.tokens import Grid
from support.sample_folders import write_sample_folder
from support.votes import make_entry, write_votes

PAGE, RESULTS = "tools/side_by_side.py", "tools/side_by_side_results.py"


def test_the_list_of_prompts_is_one_of_requests(tmp_path, script):
    path = tmp_path / "prompts.json"
    done = script(PAGE, "--prompts-out", path, "--prompts-per-domain", 2, "--size", "17x32x48", "--seed", 5)
    assert done.code == 0, done.err
    assert "42 prompts of 21 domains" in done.out
    requests = read_entries(path)
    assert [request.prompt for request in requests] == load_default_prompt_domains().make_prompts(2, seed=5)
    assert {request.size for request in requests} == {Grid(17, 32, 48)}
    assert len({request.seed for request in requests}) == 42
    assert script(PAGE, "--prompts-out", path).code == 0
    assert {request.size for request in read_entries(path)} == {None}


def test_the_commands_lead_from_samples_to_results(tmp_path, script):
    domains = tmp_path / "domains.json"
    domains.write_text(json.dumps([{"name": "pets", "templates": ["a {subject}"], "subjects": ["cat", "dog"]}]))
    prompts = ["a cat", "a dog", "a hen"]
    folders = [write_sample_folder(tmp_path / name, prompts, shade=shade) for name, shade in (("a", 90), ("b", 180))]
    out = tmp_path / "page"
    options = ("--domains", domains, "--controls", 0.1, "--control-sets", 1)
    done = script(PAGE, *folders, "--out", out, "--names", "new", "old", *options)
    assert done.code == 0, done.err
    assert "4 pairs, 1 of them controls" in done.out
    assert "each rater sees 3 comparisons and 1 controls" in done.out
    key = PageKey.read(tmp_path / "page.key.json")
    assert key.systems == ("new", "old")
    assert {pair.prompt: pair.domain for pair in key.pairs} == {"a cat": "pets", "a dog": "pets", "a hen": "other"}
    votes = write_votes(tmp_path / "v.json", key, "Ada", [make_entry(pair, "new") for pair in key.pairs])
    results = tmp_path / "results.json"
    done = script(RESULTS, tmp_path / "page.key.json", votes, "--out", results)
    assert done.code == 0, done.err
    assert "new against old" in done.out
    assert "1 of 1" in done.out
    rates = json.loads(results.read_text())["questions"]["look"]["win_rates"]
    assert {rate["domain"]: (rate["value"], rate["wins"]) for rate in rates} == {
        "overall": (1.0, 3),
        "other": (1.0, 1),
        "pets": (1.0, 2),
    }


def test_mistakes_end_with_code_2_and_name_the_file_or_option(tmp_path, script):
    folders = [write_sample_folder(tmp_path / name, [prompt]) for name, prompt in (("a", "a cat"), ("b", "a dog"))]
    for arguments, expected in (
        ([*folders, "--out", tmp_path / "page"], "'a cat'"),
        ([folders[0], "--out", tmp_path / "page"], "two folders"),
        ([*folders], "--out is missing"),
        ([], "--out is missing"),
        (["--prompts-out", tmp_path / "p.json", "--prompts-per-domain", 0], "--prompts-per-domain 0"),
        (["--prompts-out", tmp_path / "p.json", "--prompts-per-domain", 106], "has 105 prompts"),
        (["--prompts-out", tmp_path / "p.json", "--size", "big"], "--size big"),
        ([*folders, "--out", tmp_path / "page", "--controls", 0.7], "controls=0.7"),
        ([*folders, "--out", tmp_path / "page", "--pairs-per-rater", 0], "pairs_per_rater=0"),
    ):
        done = script(PAGE, *arguments)
        assert done.code == 2, arguments
        assert expected in done.err.replace("\n", " ")
    (tmp_path / "key.json").write_text("{}")
    done = script(RESULTS, tmp_path / "key.json", tmp_path / "votes.json")
    assert done.code == 2
    assert "key.json is no key" in done.err.replace("\n", " ")
