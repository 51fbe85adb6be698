"""What can be wrong with a version, and with what is asked of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class ArtefactInvalid(ValueError):
    """A version that must not serve: missing, altered, cut short, unsigned, or not what its manifest says."""


class ReleaseRefused(ValueError):
    """A change of stage that makes no sense; the sentence says why and what does."""


def first_fault(error: ValidationError) -> str:
    """Of what a file or a wish gets wrong the first, as "field: what is wrong with it"."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    return f"{field}: {first['msg']}" if field else str(first["msg"])
