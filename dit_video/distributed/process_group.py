"""The processes of a run as JAX's coordination service knows them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run and the connection of this one to their coordination service, which process 0 keeps.

    The numbers are those of the service. `jax.process_index()` comes from the devices, and may number processes in
    another order on TPUs of several slices.
    """

    client: Any
    """Client of the coordination service; None for a single process."""
    process_id: int
    """Number of this process."""
    process_count: int
    """Number of processes."""

    @classmethod
    def get_current(cls) -> "ProcessGroup":
        """Return the group that `jax.distributed.initialize` has connected; a group of one before or without it."""
        from jax._src import distributed  # Private: JAX has no public interface for its service yet; Orbax does so too.

        state = distributed.global_state
        return cls(state.client, state.process_id or 0, state.num_processes or 1)

    @property
    def is_first(self) -> bool:
        """Return True in process 0, which keeps the service, and gathers and checks for all."""
        return self.process_id == 0

    def get_interval(self, seconds: float, *, calls: int = 1) -> float:
        """Return an interval of repeated calls that is longer in large groups, to limit the work of process 0.

        Args:
          seconds: Interval of a small group.
          calls: Number of calls of each process at each interval.
        """
        return max(seconds, self.process_count * calls / _MAX_CALLS_PER_SECOND)


_MAX_CALLS_PER_SECOND = 500.0
"""Number of repeated calls of all processes per second for one purpose. The service takes 0.15 ms for one."""
