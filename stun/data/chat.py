"""Chat messages as text."""

from transformers import PreTrainedTokenizerBase

from stun.config import StunError
from stun.data.rows import one_line

# ShareGPT's names of the speakers, and the chat templates'.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool"}


def rendered(messages: list, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Chat messages as one text. The checkpoint's template is a program; transformers runs it in a sandbox. Raises StunError."""
    messages = [_message(message, where) for message in messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # whatever the template does
        raise StunError(f"{where}: the chat template of {tokenizer.name_or_path} fails: {one_line(error)}") from error


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
