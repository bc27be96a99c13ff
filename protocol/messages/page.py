"""How much one answer of a list may hold."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

#: Rows of a page. An answer may have fewer, with ``more`` set: a message has its limit too.
LARGEST_PAGE: Final = 500

PageLimit = Annotated[int, msgspec.Meta(ge=1, le=LARGEST_PAGE)]
