"""Conversations as chat templates take them: messages with a role and a content of texts and media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridvlm.tokenizers.text import Text, medium, person

# {"role": ..., "content": text, or a list of {"type": "video" or "image"} and {"type": "text", "text": ...}}
Message = Mapping[str, Any]

# Those who may be named in a control token that a template puts together ('<|' + message.role + '|>')
ROLES = ("system", "user", "assistant", "tool", "developer")

# The type of a part of a content, and a person's words or the position of a medium.
Part = tuple[str, Text]


def parts_of(messages: Sequence[Message]) -> list[tuple[str, list[Part]]]:
    """(role, parts) of every message, media numbered in order; ValueError for a kind of content that is not supported."""
    spoken, count = [], 0
    for message in messages:
        parts: list[Part] = []
        content = message["content"]
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if item["type"] == "text":
                parts.append(("text", item["text"] if isinstance(item["text"], Text) else person(item["text"])))
            elif item["type"] in ("video", "image"):
                parts.append((item["type"], medium(count)))
                count += 1
            else:
                raise ValueError(
                    f"content of type {item['type']!r} is not supported; give video, image and text"
                    + (" (sound is not read: take the pictures alone)" if item["type"] == "audio" else "")
                )
        spoken.append((message["role"], parts))
    return spoken
