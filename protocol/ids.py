"""Names of things, as types that are not mistaken for each other.

Task and batch ids are snowflake ids (see ``snowflake``): 64-bit numbers on the wire,
decimal strings in JSON and on the command line, because JavaScript and jq round
integers above 2**53.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, NewType

from msgspec import Meta

from protocol.errors import BadRequest

TaskId = NewType("TaskId", int)
BatchId = NewType("BatchId", int)
#: Name of a node, chosen when its runner joins.
NodeName = NewType("NodeName", str)
UserName = NewType("UserName", str)

#: Ids as peers name them: what a store of signed 64-bit numbers can look for.
NamedTask = Annotated[TaskId, Meta(ge=0, le=2**63 - 1)]
NamedBatch = Annotated[BatchId, Meta(ge=0, le=2**63 - 1)]

#: A DNS label without capitals, so that a node's name can be part of a host name.
_NODE_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_ID: Final = re.compile(r"[0-9]{1,19}")
_LARGEST: Final = 2**63 - 1


def parse_id(text: str) -> int:
    """Read a task or batch id as people write it.

    Raises:
        BadRequest: The text is no id.
    """
    if not _ID.fullmatch(text) or not 0 < int(text) <= _LARGEST:
        raise BadRequest(
            f"{text!r} is not a task or batch id",
            hint="ids are whole numbers; see them with: kohaku task list",
        )
    return int(text)


def parse_node_name(text: str) -> NodeName:
    """Check a node's name: a DNS label of lower-case letters, digits and inner hyphens.

    Raises:
        BadRequest: The text cannot be a node's name.
    """
    if not _NODE_NAME.fullmatch(text):
        raise BadRequest(
            f"{text!r} cannot be a node's name",
            hint="use 1 to 63 lower-case letters, digits and inner hyphens",
        )
    return NodeName(text)


def parse_environment_name(text: str) -> str:
    """Check an environment's name: as a node's, so that it can be part of an image's name.

    Raises:
        BadRequest: The text cannot be an environment's name.
    """
    if not _NODE_NAME.fullmatch(text):
        raise BadRequest(
            f"{text[:100]!r} cannot be an environment's name",
            hint="use 1 to 63 lower-case letters, digits and inner hyphens",
        )
    return text
