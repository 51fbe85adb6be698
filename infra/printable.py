"""Somebody else's text on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with escapes in the place of what would steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
