"""A JSON list of objects, as some data sets are published, read as lines of JSON: never the whole of it at once."""

import codecs
import io
import json
from typing import IO, Any

READ_BYTES = 1 << 20


class ObjectLines(io.RawIOBase):
    """The values of a JSON list, one a line. stream: of bytes, from the list's beginning on.

    Bytes that are not UTF-8 pass through, for the reader of the line to name. Reading raises ValueError, with the
    number of the value, where the list is not one.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._rest = stream, b""
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text, self._number, self._is_over = "", 0, False
        self._skip("[\ufeff")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and not self._is_over:
            self._rest = self._next()
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)], self._rest = taken, self._rest[len(taken) :]
        return len(taken)

    def _next(self) -> bytes:
        """The next value as a line; nothing at the list's end."""
        self._skip(",")
        if self._text.startswith("]"):
            self._is_over = True
            return b""
        self._number += 1
        while True:
            try:
                _, end = json.JSONDecoder().raw_decode(self._text)
                break
            except RecursionError:
                raise ValueError(f"record {self._number}: too many brackets in each other") from None
            except json.JSONDecodeError as error:
                if not self._read():
                    raise ValueError(f"record {self._number}: not valid JSON: {error.msg}") from error
        line, self._text = self._text[:end], self._text[end:]
        return line.replace("\r", " ").replace("\n", " ").encode("utf-8", "surrogateescape") + b"\n"

    def _skip(self, signs: str) -> None:
        """Pass over blanks and these signs."""
        while not (text := self._text.lstrip(f" \t\r\n{signs}")) and self._read():
            pass
        self._text = text

    def _read(self) -> bool:
        more = self._stream.read(READ_BYTES)
        self._text += self._decode(more, final=not more)
        return bool(more)
