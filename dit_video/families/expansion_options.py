"""Options of the language model that expands prompts."""

from dataclasses import dataclass
from pathlib import Path

from dit_video.core.chat import ChatServer
from dit_video.core.errors import MissingError
from dit_video.families import get_prompt_instructions
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.sampling.expansion import PromptExpander


@dataclass(frozen=True)
class ExpansionOptions:
    """Expansion of prompts by a language model on a server with OpenAI's interface; results are cached."""

    expand: str | None = None
    """Name of a language model, as the server knows it, that expands prompts; no expansion by default."""
    expand_url: str = ChatServer.url
    """Address of the server."""
    expand_key_variable: str = ChatServer.key_variable
    """Environment variable with the server's key; a server on this machine needs none."""
    expand_max_tokens: int = PromptExpander.max_tokens
    """Maximum length of an answer in tokens, with those that the language model thinks in."""
    expand_instructions: Path | None = None
    """Text file of the instructions that the language model gets, instead of those for the model's family."""

    def make_expander(self, backbone: BackboneConfig) -> PromptExpander | None:
        """Return the expander of prompts for a model; None if there is none.

        Raises:
          MissingError: If the file of instructions does not exist, the package openai is not installed, or there is no
            key.
          UserError: If the address is invalid.
        """
        if self.expand is None:
            return None
        instructions = get_prompt_instructions(backbone)
        if self.expand_instructions is not None:
            if not self.expand_instructions.is_file():
                raise MissingError(f"no such file of instructions: {self.expand_instructions}")
            instructions = self.expand_instructions.read_text(encoding="utf-8")
        server = ChatServer(url=self.expand_url, model=self.expand, key_variable=self.expand_key_variable)
        server.check()
        cache = Path.home() / ".cache" / "dit_video" / "prompts"
        return PromptExpander(server=server, instructions=instructions, cache=cache, max_tokens=self.expand_max_tokens)
