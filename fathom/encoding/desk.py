"""What all requests to one model share. Reference api B.2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fathom.encoding.codec import Codec
from fathom.encoding.replay import ReplayStore
from fathom.errors import ContextError, RequestError


@dataclass(frozen=True)
class Desk:
    """What all requests share.

    served: the names of the model; context: tokens; strict: refuse what the hosted service refuses; users: whether
    Messages isolates `user_id`s as Chat Completions does.
    """

    codec: Codec
    served: tuple[str, ...]
    context: int
    strict: bool = False
    users: bool = False
    replay: ReplayStore = field(default_factory=ReplayStore)

    def model(self, requested: Any, protocol: str) -> str:
        """The served model behind a requested name. Raises RequestError."""
        if not isinstance(requested, str) or not requested:
            raise RequestError(400, f"model is missing: use {self._names()}", param="model")
        name = requested.removesuffix("[1m]")
        if name in self.served:
            return name
        if protocol == "messages" and name.startswith("claude"):
            wanted = "deepseek-v4-pro" if "opus" in name else "deepseek-v4-flash"
            return wanted if wanted in self.served else self.served[0]
        raise RequestError(400, f"model '{requested}' is not served: use {self._names()}", param="model")

    def bounded(self, text: str) -> str:
        """A text of a prompt, if the context may hold it. Raises ContextError, soon and for little memory."""
        if self.codec.tokenizer.surely_more(text, self.context):
            limit = f"the prompt has more than {self.context} tokens, but the context holds {self.context}"
            raise ContextError(f"{limit} with the answer: shorten it, or allow a longer context")
        return text

    def _names(self) -> str:
        return " or ".join(self.served)
