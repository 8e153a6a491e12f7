"""Chat messages as text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from stun.config import StunError
from stun.runtime.child import Ended, child

# ShareGPT's names of the speakers, and the chat templates'.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool"}
_MOST = 2**26  # characters of a row


@contextmanager
def rendering(tokenizer: PreTrainedTokenizerBase) -> Iterator[Callable[[list, str], str]]:
    """Context with a function that makes chat messages one text; errors name its second argument. The checkpoint's template is a
    program: transformers runs it in a sandbox, which is a child of this process here. The function raises StunError."""

    def render(messages: object) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        if len(text) > _MOST:
            raise ValueError(f"it makes {len(text):,} characters of a row; at most {_MOST:,}")
        return text

    with child(render) as ask:

        def rendered(messages: list, where: str) -> str:
            known = [_message(message, where) for message in messages]
            try:
                return ask(known)
            except Ended as error:
                raise StunError(f"{where}: the chat template of {tokenizer.name_or_path} fails: {error}") from error

        yield rendered


def _message(message: object, where: str) -> dict:
    """A message with role and content, which ShareGPT calls from and value. Raises StunError if it has neither."""
    fields = message if isinstance(message, dict) else {}
    if isinstance(fields.get("role"), str) and (isinstance(fields.get("content"), (str, list)) or fields.get("tool_calls")):
        return fields
    speaker, value = fields.get("from"), fields.get("value")
    if isinstance(speaker, str) and speaker in _ROLES and isinstance(value, str):
        return {"role": _ROLES[speaker], "content": value}
    forms = f"a role and a content, a text or its parts, or from ({', '.join(_ROLES)}) and value"
    raise StunError(f"{where}: chat messages need {forms}; one is {repr(message)[:80]}")
