"""Conversations and prompts as documents in which only the answers carry loss.

The template of a conversation, version 1: each message is `<|ROLE|>`, a line break, its content and
a line break; the end of text follows the last message. What the assistant says, up to and including
the line break after it, carries loss; the role markers and what others say do not. The markers are
plain text to the tokenizer, so that every tokenizer has them. A prompt and its completion are taken
as they are. The end of text carries loss where the last piece before it does.
"""

from __future__ import annotations

from lunaris.errors import did_you_mean

TEMPLATE = 1
ROLES = ("system", "user", "assistant", "tool")

# Texts in order, and whether each carries loss.
Pieces = list[tuple[str, bool]]


def pieces_of(record: dict[str, object]) -> Pieces | str:
    """Return the pieces of a record with `messages`, or with `prompt` and `completion`.

    Neighbouring pieces differ in whether they carry loss, so that a prompt is one piece, which is
    encoded as `lunaris generate` encodes it. For a record that is neither, return what is wrong.
    """
    if "messages" in record:
        return _conversation(record["messages"])
    if "prompt" in record or "completion" in record:
        texts = [record.get("prompt"), record.get("completion")]
        for name, text in zip(("prompt", "completion"), texts, strict=True):
            if not isinstance(text, str):
                return f"{name} is {_kind(text)}, not text"
        return [(str(texts[0]), False), (str(texts[1]), True)]
    return f"no key messages, and no keys prompt and completion, in {list(record)[:8]}"


def _conversation(messages: object) -> Pieces | str:
    if not isinstance(messages, list) or not messages:
        return "messages is not a list of at least one message"
    pieces: Pieces = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"messages[{i}] is {_kind(message)}, not an object with role and content"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            near = did_you_mean(str(role), ROLES)
            return f"messages[{i}].role is {role}; allowed are {', '.join(ROLES)}{near}"
        if not isinstance(content, str):
            return f"messages[{i}].content is {_kind(content)}, not text"
        _add(pieces, f"<|{role}|>\n", False)
        _add(pieces, f"{content}\n", role == "assistant")
    if not any(loss for _, loss in pieces):
        return "messages has no message of the assistant, so that no token would carry loss"
    return pieces


def _add(pieces: Pieces, text: str, loss: bool) -> None:
    if pieces and pieces[-1][1] == loss:
        pieces[-1] = (pieces[-1][0] + text, loss)
    else:
        pieces.append((text, loss))


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
