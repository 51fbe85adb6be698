"""Header blocks (RFC 7541): read with `hpack`, remembered where that is safe; written as literals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Generic, TypeVar

from hpack import Decoder, HPACKError, OversizedHeaderListError
from hpack.hpack import decode_integer, encode_integer

from inference.http2.frames import Code, ConnectionFailed, StreamFailed
from inference.http2.limits import BLOCKS_KEPT, MOST_METADATA_BYTES

Fields = list[tuple[bytes, bytes]]
T = TypeVar("T")

_PSEUDO: Final = frozenset((b":method", b":scheme", b":path", b":authority"))
_NEEDED: Final = frozenset((b":method", b":scheme", b":path"))
_OF_CONNECTIONS: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
_NOT_IN_VALUES: Final = (b"\0", b"\r", b"\n")


class HeaderReader(Generic[T]):
    """The header blocks of one connection, in their order. `parse` makes of the fields what is kept.

    A client repeats itself: the second of two equal blocks means what the first one did, unless the dynamic
    table changed between or through them. Such blocks are not decoded again.
    """

    def __init__(self, parse: Callable[[Fields], T]) -> None:
        self._decoder = Decoder(MOST_METADATA_BYTES)
        self._parse = parse
        self._known: dict[bytes, T] = {}

    def read(self, block: bytes) -> T:
        """Raises what `parse` does, and `ConnectionFailed` where the block is no block."""
        known = self._known.get(block)
        if known is not None:
            return known
        fields = self.decode(block)
        parsed = self._parse(fields)
        if len(self._known) >= BLOCKS_KEPT or changes_table(block):
            self._known.clear()
        if not changes_table(block):
            self._known[block] = parsed
        return parsed

    def decode(self, block: bytes) -> Fields:
        """Every block has to come by here, or to be known: the next ones depend on it."""
        try:
            fields = [(bytes(field[0]), bytes(field[1])) for field in self._decoder.decode(block, raw=True)]
        except OversizedHeaderListError:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "too much metadata") from None
        except (HPACKError, IndexError, UnicodeDecodeError):
            raise ConnectionFailed(Code.COMPRESSION_ERROR, "the header block is no block") from None
        if changes_table(block):
            self._known.clear()
        return fields


def changes_table(block: bytes) -> bool:
    """Whether a block that can be decoded adds to the dynamic table or resizes it."""
    at = 0
    while at < len(block):
        kind = block[at]
        if kind & 0x80:  # an indexed field
            at += decode_integer(block[at:], 7)[1]
        elif kind & 0x60:  # a literal that is added, or a new size
            return True
        else:  # a literal that is not added
            index, read = decode_integer(block[at:], 4)
            at += read
            for _ in range(1 if index else 2):
                length, read = decode_integer(block[at:], 7)
                at += read + length
    return False


def check_request(fields: Fields) -> None:
    """Raises `StreamFailed` where the fields make no request (RFC 9113, 8.2 and 8.3)."""
    seen: set[bytes] = set()
    regular = False
    for name, value in fields:
        if name[:1] == b":":
            if regular or name in seen or name not in _PSEUDO:
                raise StreamFailed(Code.PROTOCOL_ERROR)
            seen.add(name)
        else:
            regular = True
            check_field(name, value)
        if any(wrong in value for wrong in _NOT_IN_VALUES):
            raise StreamFailed(Code.PROTOCOL_ERROR)
    if not seen >= _NEEDED:
        raise StreamFailed(Code.PROTOCOL_ERROR)


def check_field(name: bytes, value: bytes) -> None:
    """A field that is no pseudo field."""
    if not name or name in _OF_CONNECTIONS or name != name.lower() or b" " in name or b":" in name:
        raise StreamFailed(Code.PROTOCOL_ERROR)
    if name == b"te" and value != b"trailers":
        raise StreamFailed(Code.PROTOCOL_ERROR)


def size(fields: Fields) -> int:
    """As SETTINGS_MAX_HEADER_LIST_SIZE counts."""
    return sum(len(name) + len(value) + 32 for name, value in fields)


def literal(name: str, value: str) -> bytes:
    """A field that changes nobody's table."""
    return b"\x00" + _string(name) + _string(value)


def _string(text: str) -> bytes:
    content = text.encode()
    return bytes(encode_integer(len(content), 7)) + content
