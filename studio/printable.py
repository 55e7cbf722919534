"""Text from files and other people, made safe and fully visible for a terminal or page."""

from __future__ import annotations

import re

_ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")


def printable(text: object, lines: bool = False) -> str:
    r"""``text`` with control characters, escape sequences, direction marks and undecodable bytes written as ``\x1b``.

    Args:
        lines: keep line breaks and tabs.
    """
    return _ODD.sub(lambda found: found[0] if lines and found[0] in "\n\t" else _escape(found[0]), str(text))


def without_bytes(text: str) -> str:
    r"""A file name with bytes that are not UTF-8 written as ``\xff``, so that it can be stored anywhere."""
    return re.sub(r"[\ud800-\udfff]", lambda found: _escape(found[0]), text)


def _escape(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # how Python represents a byte of a file name that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
