"""The one place where text of tasks and nodes is made harmless to a terminal.

Knows: which characters and sequences drive a terminal (ECMA-48, xterm's ``ctlseqs``) and
which of them only colour text.
Does not know: who wrote the text, where it will be shown.

What a task writes is hostile (DESIGN, promise 7): it could set the window's title, write to
the clipboard, make the terminal type, or paint a false prompt. Here only text, newlines,
tabs and SGR colours get through; whole sequences go, so that no half of one stays as litter.
"""

from __future__ import annotations

import codecs
import re
from typing import Final

#: What a task may write on a terminal besides text: ``ESC [ numbers m``.
RESET: Final = "\x1b[0m"

#: CR is in it: it moves the cursor back over text that was already shown.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
#: Lengths are bounded so that a lone ESC [ cannot hold text back for long.
_CSI: Final = re.compile(r"(?:\x1b\[|\x9b)([0-?]{0,64})([ -/]{0,8})([@-~])")
_CSI_BEGUN: Final = re.compile(r"(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,8}\Z")
_ESCAPE: Final = re.compile(r"\x1b[ -/]{0,8}[0-~]")
_ESCAPE_BEGUN: Final = re.compile(r"\x1b[ -/]{0,8}\Z")
#: DCS, SOS, OSC, PM and APC: a text for the terminal itself follows, up to ST.
_STRING: Final = re.compile(r"\x1b[PX\]^_]|[\x90\x98\x9d\x9e\x9f]")
#: A newline ends such a text too, or one stray ESC ] would hide the rest of a log.
_STRING_END: Final = re.compile(r"[\x07\x18\x1a\x1b\x9c\n]")
_RETURNS: Final = re.compile(r"\r+")
_SGR_NUMBERS: Final = re.compile(r"[0-9;:]*")
_SGR_RESETS: Final = frozenset({"", "0", "00"})

#: Characters that reorder or hide their neighbours: bidirectional controls (UAX 9),
#: zero-width ones, and separators that some terminals break lines at.
_INVISIBLE: Final = re.compile("[\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_BLANKS: Final = re.compile(r"[\t\n\r\x0b\x0c]+")


class OutputCleaner:
    """Bytes of one output in, harmless text out, however the bytes are cut into chunks.

    A return to the start of the line becomes a newline: progress bars stay readable, and
    no text can be painted over.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._in_string = False
        self._coloured = False

    def feed(self, data: bytes) -> str:
        """Take the next bytes and give what can be shown of them now."""
        return self._clean(self._held + self._decoder.decode(data))

    def finish(self) -> str:
        """Give what is left, with colours switched off if they were on."""
        shown = self._clean(self._held + self._decoder.decode(b"", final=True))
        self._held = ""
        if self._coloured:
            self._coloured = False
            shown += RESET
        return shown

    def _clean(self, text: str) -> str:
        self._held = ""
        shown: list[str] = []
        place = 0
        while place < len(text):
            if self._in_string:
                place = self._skip_string(text, place)
                continue
            control = _CONTROL.search(text, place)
            if control is None:
                shown.append(text[place:])
                break
            shown.append(text[place : control.start()])
            piece, place = self._take_control(text, control.start())
            shown.append(piece)
        return "".join(shown)

    def _skip_string(self, text: str, place: int) -> int:
        end = _STRING_END.search(text, place)
        if end is None:
            return len(text)
        if end[0] == "\x1b" and end.end() == len(text):
            self._held = "\x1b"  # the backslash that makes it ST may be in the next chunk
            return len(text)
        self._in_string = False
        if end[0] in "\x07\x9c":
            return end.end()
        return end.end() + 1 if text.startswith("\x1b\\", end.start()) else end.start()

    def _take_control(self, text: str, place: int) -> tuple[str, int]:
        """Give what stays of the control or sequence at ``place``, and where it ends."""
        if returns := _RETURNS.match(text, place):
            if returns.end() == len(text):
                self._held = "\r"  # a newline may follow in the next chunk
                return "", len(text)
            return ("" if text[returns.end()] == "\n" else "\n"), returns.end()
        if sequence := _CSI.match(text, place):
            return self._take_csi(*sequence.groups()), sequence.end()
        if string := _STRING.match(text, place):
            self._in_string = True
            return "", string.end()
        if _CSI_BEGUN.match(text, place) or _ESCAPE_BEGUN.match(text, place):
            self._held = text[place:]
            return "", len(text)
        escape = _ESCAPE.match(text, place)
        return "", escape.end() if escape else place + 1

    def _take_csi(self, numbers: str, between: str, final: str) -> str:
        if final != "m" or between or not _SGR_NUMBERS.fullmatch(numbers):
            return ""
        self._coloured = numbers not in _SGR_RESETS
        return f"\x1b[{numbers}m"


def clean_block(text: str) -> str:
    """Make text of several lines harmless: newlines and tabs stay, colours go."""
    cleaner = OutputCleaner()
    shown = cleaner.feed(text.encode("utf-8", "replace")) + cleaner.finish()
    return _CSI.sub("", shown)


def clean_line(text: str) -> str:
    """Make a name or a message harmless on one line: no colours, nothing that hides or reorders."""
    if text.isascii() and text.isprintable():
        return text
    return _BLANKS.sub(" ", _INVISIBLE.sub("", clean_block(text))).strip()
