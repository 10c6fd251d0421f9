"""What a chunk is called in the engine; the drafter there reads from it to which response of which group it belongs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# group:session:request:turn~life:generated:attempt, `p` for a probe; vLLM adds eight characters to every id.
_CHUNK = re.compile(
    r"(?P<response>(?P<group>.+):\d+:[^:]+:\d+~\d+):(?P<generated>\d+):\d+(?P<probe>p?)(?:-[0-9a-f]{8})?"
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a name says.

    Args:
        group: responses of one group draft for one another.
        response: the same for all chunks of a response, on every instance.
        generated: tokens of the response that are in the chunk's prompt.
        probe: whether the group's length is learnt from this response (high priority in Algorithm 1).
    """

    group: str
    response: str
    generated: int
    probe: bool


def response_name(group: str, session: int, request_id: str, turn: int) -> str:
    """A response: one turn of one sample of a group. `request_id` has no colon."""
    return f"{group}:{session}:{request_id}:{turn}"


def chunk_name(response: str, lives: int, generated: int, attempt: int, probe: bool) -> str:
    """A chunk of a response that has `generated` tokens so far.

    Args:
        lives: how often the response went on from an earlier place, after a lost server: what it said there is void.
        attempt: counts the response's chunks; makes the name unique.
    """
    return f"{response}~{lives}:{generated}:{attempt}{'p' if probe else ''}"


def parse_chunk(request_id: str, prompt: Sequence[int] | np.ndarray[Any, Any]) -> Chunk:
    """What the engine's request is. A name that is not ours is a response of its own; its group are those with the
    same prompt."""
    found = _CHUNK.fullmatch(request_id)
    if found is not None and int(found["generated"]) < len(prompt):
        return Chunk(found["group"], found["response"], int(found["generated"]), bool(found["probe"]))
    digest = hashlib.blake2b(np.asarray(prompt, np.int32).tobytes(), digest_size=16).hexdigest()
    return Chunk(f"prompt-{digest}", request_id, 0, False)
