"""Keys and votes of raters for tests, without a page."""

import json

from dit_video.curation.raters.votes import TIE, PageControl, PageKey, PagePair


def make_key(systems=("a", "b"), prompts=4, controls=0):
    """Return a key of all pairs of systems on prompts of two domains, with controls that ask for the look."""
    pairs = [
        PagePair(
            name=f"p{item}-{i}{j}",
            item=item,
            prompt=f"prompt {item}",
            domain=("pets", "sport")[item % 2],
            sides=(f"{item}-{i}{j}-0", f"{item}-{i}{j}-1"),
            systems=(systems[i], systems[j]) if item % 3 else (systems[j], systems[i]),
        )
        for item in range(prompts)
        for i in range(len(systems))
        for j in range(i + 1, len(systems))
    ]
    pairs += [
        PagePair(
            name=f"c{number}",
            item=number % prompts,
            prompt=f"prompt {number % prompts}",
            domain=("pets", "sport")[number % prompts % 2],
            sides=(f"c{number}-0", f"c{number}-1"),
            systems=(systems[0], systems[0]),
            control=PageControl(kind="degraded", question="look", right=f"c{number}-{number % 2}"),
        )
        for number in range(controls)
    ]
    return PageKey(page="page", systems=tuple(systems), seed=0, pairs=tuple(pairs))


def make_entry(pair, answer, **values):
    """Return a vote of the file; `answer` is a system, `right` or `wrong` of a control, or a tie."""
    if pair.control is not None and answer != TIE:
        wrong = next(side for side in pair.sides if side != pair.control.right)
        side = pair.control.right if answer != "wrong" else wrong
    else:
        side = TIE if answer == TIE else pair.sides[pair.systems.index(answer)]
    return {"pair": pair.name, "left": pair.sides[0], "prompt": side, "look": side, "seconds": 2.0, **values}


def write_votes(path, key, rater, entries, **values):
    """Write a file of votes as the page exports it."""
    document = {"format": 1, "page": key.page, "rater": rater, "votes": entries, **values}
    path.write_text(json.dumps(document))
    return path
