"""A key-value store for short texts of all processes of a run, kept by the first process."""

import time
from typing import Any

_PREFIX = "dit_video"


class KeyValueStore:
    """Texts by name, shared by all processes of the run. Every call may fail if the first process is gone.

    It is the store that JAX opens for its own use, which has no public interface yet; Orbax uses it in the same way.
    """

    def __init__(self, namespace: str) -> None:
        """Open a namespace of the store.

        Args:
          namespace: Prefix that separates names from those of others.
        """
        from jax._src import distributed  # Private: see the class docstring.

        self._client: Any = distributed.global_state.client
        self._namespace = f"{_PREFIX}/{namespace}/"

    def write(self, name: str, text: str) -> None:
        """Write a text under a name, replacing any earlier one."""
        self._client.key_value_set(self._namespace + name, text, allow_overwrite=True)

    def read(self) -> dict[str, str]:
        """Return all texts of the namespace."""
        texts = self._client.key_value_dir_get(self._namespace)
        return {name.removeprefix(self._namespace): text for name, text in texts}

    def wait_for(self, names: set[str], seconds: float) -> dict[str, str]:
        """Return all texts of the namespace, once these names are among them.

        Raises:
          TimeoutError: If names are missing after `seconds`; the message lists them.
        """
        deadline = time.monotonic() + seconds
        while missing := names - (texts := self.read()).keys():
            if time.monotonic() > deadline:
                raise TimeoutError(", ".join(sorted(missing)))
            time.sleep(0.1)
        return texts
