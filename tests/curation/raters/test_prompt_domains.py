"""Domains of prompts."""

import json

import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.curation.raters.prompt_domains import (
    PromptDomain,
    PromptDomains,
    load_default_prompt_domains,
    read_prompt_domains,
)

DEFAULTS = load_default_prompt_domains()
PETS = {"name": "pets", "templates": ["{subject} {scene}", "{subject}"], "subjects": ["a cat", "a dog"]}


def test_there_are_21_domains_with_20_prompts_or_more():
    assert len({domain.name for domain in DEFAULTS.domains}) == 21
    assert all(len(domain.list_prompts()) >= 20 for domain in DEFAULTS.domains)


def test_the_domain_of_every_prompt_is_its_own():
    for domain in DEFAULTS.domains:
        assert {DEFAULTS.find_domain(prompt) for prompt in domain.list_prompts()} == {domain.name}
    prompt = DEFAULTS.domains[3].list_prompts()[0]
    assert DEFAULTS.find_domain(f"  {prompt.upper()} ") == DEFAULTS.domains[3].name
    assert DEFAULTS.find_domain(f"{prompt} twice") == "other"


def test_prompts_are_drawn_by_the_seed_without_repetition():
    prompts = DEFAULTS.make_prompts(105, seed=1)
    assert len(set(prompts)) == len(prompts) == 21 * 105
    assert DEFAULTS.make_prompts(3, seed=1) != DEFAULTS.make_prompts(3, seed=2)
    few = DEFAULTS.make_prompts(3, seed=1)
    assert set(few) < set(prompts)
    assert [DEFAULTS.find_domain(prompt) for prompt in few[:4]] == ["people"] * 3 + ["groups of people"]
    with pytest.raises(UserError, match=r"count=106.*has 105 prompts"):
        DEFAULTS.make_prompts(106)


def test_domains_are_read_from_json(tmp_path):
    path = tmp_path / "domains.json"
    path.write_text(json.dumps([{**PETS, "scenes": ["on grass"]}, {"name": "sky", "templates": ["clouds"]}]))
    domains = read_prompt_domains(path)
    pets = PromptDomain(
        name="pets", templates=("{subject} {scene}", "{subject}"), subjects=("a cat", "a dog"), scenes=("on grass",)
    )
    assert domains == PromptDomains(domains=(pets, PromptDomain(name="sky", templates=("clouds",))))
    assert pets.list_prompts() == ["a cat on grass", "a dog on grass", "a cat", "a dog"]


@pytest.mark.parametrize(
    ("document", "match"),
    [
        ({}, "JSON list of domains"),
        ([], "JSON list of domains"),
        ([PETS], r"\{scene\}"),
        ([7], "JSON list of domains"),
        ([{"name": "sky", "templates": ["a {place}"]}], r"\{place\}"),
        ([{"name": "sky", "templates": ["a {"]}], r"a \{"),
        ([{"name": "other", "templates": ["a"]}], "name='other'"),
        ([{"name": 7, "templates": ["a"]}], "name=7"),
        ([{"name": "sky"}], "templates"),
        ([{"name": "sky", "templates": []}], "has templates"),
        ([{"name": "sky", "templates": "clouds"}], "templates='clouds'"),
        ([{"name": "sky", "templates": ["a"], "words": []}], "words"),
        ([{"name": "sky", "templates": ["a"]}] * 2, "sky"),
        ([{"name": "sky", "templates": ["a"]}, {"name": "sea", "templates": ["A "]}], "one domain"),
    ],
)
def test_an_invalid_config_is_an_error_that_names_the_file(tmp_path, document, match):
    (tmp_path / "domains.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"domains\.json.*{match}"):
        read_prompt_domains(tmp_path / "domains.json")
    with pytest.raises(MissingError):
        read_prompt_domains(tmp_path / "absent.json")
