"""The problems that checks find, and their log."""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from dit_video.training.hooks.logging import print_on_first_process

FILE = "self_check.jsonl"
"""Name of the log in the folder of a training."""
MAX_MESSAGES = 3
"""Number of problems of one check that are printed; all are logged."""


class Problem(NamedTuple):
    """A difference between a training and what it should be."""

    check: str
    """Name of the check, such as "latents"."""
    message: str
    """Description of the difference, and of where to look for its cause."""


class ProblemLog:
    """The log of a training's problems, `{"step": …, "check": …, "message": …}` on each line.

    The file exists, and may be empty, once the first checks are over.
    """

    def __init__(self, path: Path, *, is_written: bool):
        self._path, self._is_written = path, is_written
        self._counts = Counter[str]()

    def add(self, step: int, problems: list[Problem]) -> None:
        """Log the problems that were found at a step, and print the first ones of each check."""
        for problem in problems:
            self._counts[problem.check] += 1
            if self._counts[problem.check] <= MAX_MESSAGES:
                print_on_first_process(f"self-check, step {step}: {problem.check}: {problem.message}")
        if self._is_written:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.writelines(json.dumps({"step": step, **problem._asdict()}) + "\n" for problem in problems)
