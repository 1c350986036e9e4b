"""The problems that checks find, and their log."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

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

    def __init__(self, path: Path, *, process: int = 0):
        self._path, self._process = path, process
        self._counts = Counter[str]()
        self._is_made = False
        """Whether the file exists; without problems it is not opened again, as steps are short."""

    def add(self, step: int, problems: list[Problem], *, is_local: bool = False) -> None:
        """Log problems at a step, and print the first ones of each check.

        Args:
          step: Number of steps done.
          problems: The problems.
          is_local: Whether they are of this process alone, such as of its rows. Other processes than the first, which
            writes the log, print these, and leave those that all have to the first.
        """
        for problem in problems if is_local or self._process == 0 else []:
            self._counts[problem.check] += 1
            if self._counts[problem.check] <= MAX_MESSAGES:
                where = f", process {self._process}" if self._process else ""
                print(
                    f"self-check, step {step}{where}: {problem.check}: {problem.message}", file=sys.stderr, flush=True
                )
        if self._process == 0 and (problems or not self._is_made):
            self._is_made = True
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.writelines(json.dumps({"step": step, **problem._asdict()}) + "\n" for problem in problems)
