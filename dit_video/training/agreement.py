"""Results and decisions that all processes of a run share, without a collective operation of their devices.

A process that has failed would not enter such an operation, and the others would wait in it. Here each process reports
through the run's key-value store, and the first decides for all.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, NoReturn, TypeVar

from dit_video.core.errors import TransientError, UserError
from dit_video.core.storage import classify_read_error
from dit_video.distributed.faults.store import KeyValueStore
from dit_video.distributed.processes import is_in_turn

T = TypeVar("T")

FailureKind = Literal["none", "damage", "transient", "access", "mistake", "defect"]
_SEVERITY: tuple[FailureKind, ...] = ("none", "damage", "transient", "access", "mistake", "defect")
_meeting_numbers = itertools.count()


def share_text(action: str, text: str) -> str:
    """Return the text of the first process; all processes call this, in the same order.

    Args:
      action: What the text is for, which has to be the same in all processes.
      text: Text of this process.

    Raises:
      RuntimeError: If the processes do different things.
    """
    return _meet(action, text, lambda texts: texts[0])


@dataclass(frozen=True)
class SharedResult(Generic[T]):
    """Result of a function that all processes have called, and the worst failure among them."""

    value: T | None
    """Result in this process; None after its failure."""
    kind: FailureKind = "none"
    """Kind of the failure: none, damaged data, storage that may answer later, denied access, a mistake of the user, or
    any other error."""
    reason: str = ""
    """Description of the failure, with the process if it was another one; empty without one."""
    error: Exception | None = None
    """Error of this process, if it failed."""


def call_together(action: str, function: Callable[[], T]) -> SharedResult[T]:
    """Call a function in this process and wait until all others have called theirs.

    Args:
      action: What the function does, which has to be the same in all processes.
      function: A function without collective operations, unless it cannot fail before them.

    Raises:
      RuntimeError: If the processes do different things, or this is called in a block of `main_process_first`.
    """
    check_is_not_in_turn(action)
    value, error = None, None
    try:
        value = function()
    except Exception as raised:
        error = raised
    own_kind = "none" if error is None else _classify(error)
    own_reason = "" if error is None else format_error(error)
    kind, reason, index = json.loads(_meet(action, json.dumps([own_kind, own_reason]), _find_worst))
    if kind != own_kind:
        reason = f"in process {index}: {reason}"
    return SharedResult(value, kind, own_reason if kind == own_kind else reason, error)


def raise_failure(action: str, failure: SharedResult) -> NoReturn:
    """Raise the failure that all processes have agreed on; it may have happened in another one.

    Args:
      action: Description of what failed, such as "read the checkpoint of step 3".
      failure: Result of `call_together` with a failure.

    Raises:
      TransientError: If the storage does not answer.
      UserError: If access is denied, or the failing process has raised it.
    """
    if isinstance(failure.error, UserError):
        raise failure.error
    if failure.kind == "transient":
        advice = "Run the same command again; if that does not help, check the connection to the storage."
        raise TransientError(f"cannot {action} now ({failure.reason}). {advice}") from failure.error
    if failure.kind == "access":
        advice = "Check the permissions and the credentials, then run the same command again."
        raise UserError(f"cannot {action} ({failure.reason}). {advice}") from failure.error
    if failure.kind == "mistake":
        raise UserError(f"cannot {action} ({failure.reason})")
    raise failure.error or RuntimeError(f"cannot {action} ({failure.reason})")


def format_error(error: Exception) -> str:
    """Return an error's message on one line: all of a user error's, and both ends of another one that is long.

    Errors of storage tell what was written first, and the reason last.
    """
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 200 else f'{text[:80]} … {text[-120:]}'}"


def _classify(error: Exception) -> FailureKind:
    if isinstance(error, UserError):
        return "transient" if isinstance(error, TransientError) else "mistake"
    return classify_read_error(error) or "defect"


def _find_worst(texts: list[str]) -> str:
    results = [(*json.loads(text), index) for index, text in enumerate(texts)]
    return json.dumps(max(results, key=lambda result: (_SEVERITY.index(result[0]), -result[2])))


def check_is_not_in_turn(action: str) -> None:
    """Raise a RuntimeError in a block of `main_process_first`, in which a meeting of all processes would not end."""
    if is_in_turn():
        raise RuntimeError(f"cannot {action} in a block of main_process_first: all processes have to do it together")


def _meet(action: str, text: str, combine: Callable[[list[str]], str]) -> str:
    check_is_not_in_turn(action)
    store = KeyValueStore("agreement")
    if store.group.process_count == 1:
        return combine([text])

    def compare(messages: list[str]) -> str:
        actions, texts = zip(*map(json.loads, messages), strict=True)
        is_same = len(set(actions)) == 1
        return json.dumps([sorted(set(actions)), combine(list(texts)) if is_same else ""])

    number = str(next(_meeting_numbers))
    actions, result = json.loads(store.meet(number, json.dumps([action, text]), combine=compare))
    if len(actions) > 1:
        raise RuntimeError(f"the processes of the run do different things at the same time: {', '.join(actions)}")
    return result
