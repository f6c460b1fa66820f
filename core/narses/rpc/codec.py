"""Frames of Push and Pull as bytes: the wire encoding of the .proto, with `chunk` frames read and written without protobuf.

A chunk frame is tag 0x12 (field 2, length-delimited), a minimal varint, the payload. Only a byte string that is exactly that
takes the fast path; anything else is given to the generated parser, so both always agree.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from narses.rpc.v1 import parameter_server_pb2 as pb

_CHUNK_TAG = 0x12


def varint(value: int) -> bytes:
    """The minimal protobuf varint of a non-negative integer."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def chunk_frame(payload: memoryview | bytes) -> bytes:
    """One chunk frame. The join is the one copy a payload costs on the sending side before gRPC takes it."""
    return b"".join((b"\x12", varint(len(payload)), payload))


def update_frame(header: pb.UpdateHeader, payload: memoryview | bytes, trailer: pb.UpdateTrailer) -> bytes:
    """A whole update in one frame, with one copy of the payload. A message costs more time than 100 KiB of its bytes."""
    head, tail = header.SerializeToString(), trailer.SerializeToString()
    parts = (b"\x0a", varint(len(head)), head, b"\x12", varint(len(payload)), payload, b"\x1a", varint(len(tail)), tail)
    return b"".join((b"\x22", varint(sum(map(len, parts))), *parts))


def chunk_of(frame: bytes) -> memoryview | None:
    """The payload if `frame` is exactly 0x12, a minimal varint equal to the rest, and the rest; else None. No copy."""
    if len(frame) < 2 or frame[0] != _CHUNK_TAG:
        return None
    length = shift = 0
    for position in range(1, min(len(frame), 6)):
        byte = frame[position]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            minimal = byte != 0 or position == 1
            exact = length == len(frame) - position - 1
            return memoryview(frame)[position + 1 :] if minimal and exact else None
    return None


def parse_push(frame: bytes) -> memoryview | pb.PushRequest:
    """A chunk's payload, or the parsed PushRequest. Raises DecodeError for what protobuf cannot parse."""
    chunk = chunk_of(frame)
    if chunk is not None:
        return chunk
    request = pb.PushRequest.FromString(frame)
    return memoryview(request.chunk) if request.WhichOneof("frame") == "chunk" else request


def parse_pull(frame: bytes) -> memoryview | pb.PullResponse:
    """A chunk's payload, or the parsed PullResponse. Raises DecodeError for what protobuf cannot parse."""
    chunk = chunk_of(frame)
    if chunk is not None:
        return chunk
    response = pb.PullResponse.FromString(frame)
    return memoryview(response.chunk) if response.WhichOneof("frame") == "chunk" else response


def chunk_frames(payload: memoryview, chunk_bytes: int) -> list[bytes]:
    """`payload` cut into chunk frames of at most `chunk_bytes` payload bytes each."""
    return [chunk_frame(payload[at : at + chunk_bytes]) for at in range(0, len(payload), chunk_bytes)]


__all__ = [
    "DecodeError",
    "chunk_frame",
    "chunk_frames",
    "chunk_of",
    "parse_pull",
    "parse_push",
    "update_frame",
    "varint",
]
