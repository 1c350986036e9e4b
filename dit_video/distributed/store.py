"""What the processes of one run tell each other beside the devices: small texts by name, kept by the first process."""

import time
from typing import Any

_ROOM = "dit_video"


class Store:
    """Texts by name, of all processes of the run. Every call may fail where the first process is gone.

    (JAX's own store, which it opens between processes for itself; it has no public door yet. Orbax enters as here.)
    """

    def __init__(self, room: str) -> None:
        """
        Args:
          room: keeps names apart from those of others.
        """
        from jax._src import distributed  # private: used here alone

        self._client: Any = distributed.global_state.client
        self._room = f"{_ROOM}/{room}/"

    def write(self, name: str, text: str) -> None:
        """Under this name from now on."""
        self._client.key_value_set(self._room + name, text, allow_overwrite=True)

    def read(self) -> dict[str, str]:
        """All texts of the room."""
        return {name.removeprefix(self._room): text for name, text in self._client.key_value_dir_get(self._room)}

    def wait_for(self, names: set[str], seconds: float) -> dict[str, str]:
        """All texts of the room, once these are among them.

        Raises:
          TimeoutError: naming those that are not there in time.
        """
        until = time.monotonic() + seconds
        while missing := names - (found := self.read()).keys():
            if time.monotonic() > until:
                raise TimeoutError(", ".join(sorted(missing)))
            time.sleep(0.1)
        return found
