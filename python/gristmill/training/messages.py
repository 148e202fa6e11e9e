"""Messages over a stream socket: a JSON header, then raw bytes.

A frame is the length of the header (4 bytes, little-endian), the length of the payload (8 bytes), the header, the payload.
"""

import json
import socket
import struct
from time import monotonic
from typing import Any

LENGTHS = struct.Struct("<IQ")
HEADER_BYTES = 1 << 26
CHUNK = 1 << 18

Message = tuple[dict[str, Any], bytes]


class Channel:
    """One end of a socket pair.

    Args:
        connection: a connected stream socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._received = bytearray()

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """Send a message.

        Raises:
            OSError: the other end is gone, or took nothing for the socket's timeout.
        """
        encoded = json.dumps(header, separators=(",", ":")).encode()
        self.connection.sendall(LENGTHS.pack(len(encoded), len(payload)) + encoded)
        if payload:
            self.connection.sendall(payload)

    def receive(self, spin: float = 0.0) -> Message:
        """Wait for a message, for the first `spin` seconds without giving up the processor.

        Raises:
            EOFError: the other end is gone.
            OSError: the connection broke, or nothing came for the socket's timeout.
        """
        deadline = monotonic() + spin
        while spin and monotonic() < deadline:
            try:
                self._received += self._chunk(socket.MSG_DONTWAIT)
                break
            except BlockingIOError:
                pass
        while (message := self.take()) is None:
            self._received += self._chunk()
        return message

    def feed(self) -> None:
        """Read what has arrived; the socket must be readable. Raises as `receive`."""
        self._received += self._chunk()

    def take(self) -> Message | None:
        """Return a message that is complete, or None.

        Raises:
            ValueError: what came is no message.
        """
        if len(self._received) < LENGTHS.size:
            return None
        header, payload = LENGTHS.unpack_from(self._received)
        if header > HEADER_BYTES:
            raise ValueError(f"a header of {header} bytes")
        start, end = LENGTHS.size + header, LENGTHS.size + header + payload
        if len(self._received) < end:
            return None
        message = json.loads(self._received[LENGTHS.size : start]), bytes(self._received[start:end])
        del self._received[:end]
        return message

    def close(self) -> None:
        self.connection.close()

    def _chunk(self, flags: int = 0) -> bytes:
        chunk = self.connection.recv(CHUNK, flags)
        if not chunk:
            raise EOFError("the other end closed the connection")
        return chunk
