"""One training or evaluation sample: a conversation and its images, as it lies in a shard.

    KEY.json = {"messages": [{"role": "user" | "assistant" | "system",
                              "content": str | [{"type": "text", "text": str} | {"type": "image", "index": int}]}],
                "answer": str (optional), "meta": {} (optional)}
    KEY.0.jpg, KEY.1.png, ...   its images (KEY.jpg when there is one)

The messages follow HuggingFaceH4/llava-instruct-mix-vsft.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from vlmdist.errors import BadSample

ROLES = ("system", "user", "assistant")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
VISION_ROWS = "vision_rows"
"""Name, among the inputs of a micro-batch, of what says which of its tiles come as kept vision features."""


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    index: int  # into Sample.images


@dataclass(frozen=True)
class Message:
    role: str
    content: tuple[TextPart | ImagePart, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content if isinstance(part, TextPart))


@dataclass(frozen=True)
class Sample:
    number: int
    """Its place in its corpus, counted from 0 in the order of the shards."""
    key: str
    messages: tuple[Message, ...]
    images: tuple[bytes, ...] = ()
    """Encoded, as in the shard (JPEG, PNG, ...)."""
    answer: str | None = None
    """What the evaluator compares with; the last assistant turn where it is absent."""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def truth(self) -> str:
        """What the evaluator compares with: ``answer``, else the last turn of the assistant, else nothing."""
        if self.answer is not None:
            return self.answer
        last = self.messages[-1]
        return last.text if last.role == "assistant" else ""

    @property
    def question(self) -> tuple[Message, ...]:
        """The conversation without its last assistant turn: what the evaluator asks."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages


def parse_record(record: Any, num_images: int) -> tuple[tuple[Message, ...], str | None, dict[str, Any]]:
    """Check one decoded KEY.json against the sample format.

    Returns messages, answer, meta. Raises BadSample with the reason at the first thing that is wrong.
    """
    if not isinstance(record, dict):
        raise BadSample(f"the JSON is a {type(record).__name__}, not an object")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadSample('"messages" must be a list with at least one message')
    parsed = tuple(_parse_message(m, i, num_images) for i, m in enumerate(messages))
    roles = [m.role for m in parsed]
    if "system" in roles[1:]:
        raise BadSample("a system message must be the first one")
    if "user" not in roles:
        raise BadSample("no user message")
    turns = roles[1:] if roles[0] == "system" else roles
    if turns[0] != "user" or any(a == b for a, b in zip(turns, turns[1:], strict=False)):
        raise BadSample("user and assistant must alternate, the user first; found " + " ".join(roles))
    for i, m in enumerate(parsed):
        if m.role == "assistant" and not m.text.strip():
            raise BadSample(f"empty answer: message {i} of the assistant has no text")
    answer = record.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise BadSample(f'"answer" must be a string, not {type(answer).__name__}')
    meta = record.get("meta") or {}
    if not isinstance(meta, dict):
        raise BadSample(f'"meta" must be an object, not {type(meta).__name__}')
    return parsed, answer, meta


def parse_json(data: bytes) -> Any:
    """Decode a JSON member; BadSample where it is no JSON (NaN and a nesting bomb included)."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as e:
        raise BadSample(f"broken JSON: {str(e)[:200] or type(e).__name__}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _parse_message(message: Any, position: int, num_images: int) -> Message:
    if not isinstance(message, dict):
        raise BadSample(f"message {position} is a {type(message).__name__}, not an object")
    role = message.get("role")
    if role not in ROLES:
        raise BadSample(f"message {position} has the unknown role {str(role)[:40]!r}; known: {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise BadSample(f'"content" of message {position} must be a string or a list of parts')
    parts = tuple(_parse_part(part, position, num_images) for part in content)
    if role != "user" and any(isinstance(p, ImagePart) for p in parts):
        raise BadSample(f"message {position} of the {role} holds an image; only the user's may")
    return Message(role, parts)


def _parse_part(part: Any, position: int, num_images: int) -> TextPart | ImagePart:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadSample(f"a text part of message {position} has no text")
        try:
            part["text"].encode("utf-8")
        except UnicodeEncodeError:
            raise BadSample(f"the text of message {position} has half a surrogate pair: no Unicode text") from None
        return TextPart(part["text"])
    if kind == "image":
        index = part.get("index", 0)
        if index is None:
            index = 0
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < num_images:
            raise BadSample(
                f"image tag without image: message {position} asks for image {str(index)[:20]}, "
                f"the sample has {num_images}"
            )
        return ImagePart(index)
    raise BadSample(f"message {position} has a part of unknown type {str(kind)[:40]!r}; known: text, image")
