"""What a program, a bucket or another person wrote, in letters that act neither on a terminal nor on a line's order."""

import re

_COLOR = re.compile(r"\x1b\[[0-9;:]*m")
# C0 but for tab, newline and carriage return; DEL and C1; the marks, embeddings, overrides and isolates of Unicode's
# property Bidi_Control; the line and paragraph separators; half of a surrogate pair, which cannot even be encoded.
_ACTING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, bars: bool = False) -> str:
    r"""Return a text without colours, and with every character that acts on a terminal written as \u001b.

    In a JSON document that is the same text. Tabs and newlines stay.

    Args:
        text: Anything.
        bars: Whether a carriage return stays too: progress bars are made of them, and they hide but their own line.
    """
    text = _ACTING.sub(_escaped, _COLOR.sub("", text).replace("\r\n", "\n"))
    return text if bars else text.replace("\r", r"\u000d")


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
