"""The fast path and the generated parser agree on every byte string, so any client made from the .proto interoperates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import blake3
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from narses.rpc import codec
from narses.rpc.codec import (
    DecodeError,
    chunk_frame,
    chunk_frames,
    chunk_of,
    parse_pull,
    parse_push,
    update_frame,
    varint,
)
from narses.rpc.digest import digest, hasher
from narses.rpc.v1 import parameter_server_pb2 as pb

SEVERAL_MIB = 3 << 20

payloads = st.binary(max_size=300)
numbers = st.integers(0, 2**64 - 1)
small = st.integers(0, 2**32 - 1)


@st.composite
def long_varints(draw: st.DrawFn, values: st.SearchStrategy[int]) -> bytes:
    """A varint, minimal or padded with up to nine empty groups: protobuf parsers take both."""
    encoded = bytearray(varint(draw(values)))
    padding = draw(st.integers(0, 9))
    if padding:
        encoded[-1] |= 0x80
        encoded += b"\x80" * (padding - 1) + b"\x00"
    return bytes(encoded)


headers = st.builds(
    pb.UpdateHeader,
    run_id=st.binary(max_size=16),
    worker=small,
    round=numbers,
    base_digest=st.binary(max_size=32),
    byte_length=numbers,
)
push_requests = st.one_of(
    st.builds(lambda header: pb.PushRequest(header=header), headers),
    st.builds(lambda chunk: pb.PushRequest(chunk=chunk), payloads),
    st.builds(lambda digest: pb.PushRequest(trailer=pb.UpdateTrailer(digest=digest)), payloads),
).map(lambda message: message.SerializeToString())
pull_responses = st.one_of(
    st.builds(lambda n, rule: pb.PullResponse(header=pb.RoundHeader(n=n, rule=rule)), small, st.text(max_size=20)),
    st.builds(lambda chunk: pb.PullResponse(chunk=chunk), payloads),
).map(lambda message: message.SerializeToString())
# length-delimited fields of any number, with lengths that are right, wrong or written in too many bytes
fields = st.builds(
    lambda number, wire, length, payload: varint(number << 3 | wire) + length + payload,
    st.integers(0, 40),
    st.integers(0, 7),
    long_varints(st.integers(0, 40)),
    st.binary(max_size=40),
)
right_length_fields = st.builds(
    lambda tag, payload, padding: (
        bytes([tag]) + bytes([len(payload) | 0x80]) + b"\x80" * padding + b"\x00" + payload
        if padding >= 0
        else bytes([tag, len(payload)]) + payload
    ),
    st.sampled_from([0x0A, 0x12, 0x1A, 0x22, 0x10, 0x15]),
    st.binary(max_size=100),
    st.integers(-1, 8),
)
frames = st.one_of(push_requests, pull_responses, fields, right_length_fields)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Valid frames, one or two after another, cut short, prolonged or with a byte changed."""
    data = bytearray(b"".join(draw(st.lists(frames, min_size=1, max_size=2))))
    match draw(st.integers(0, 4)):
        case 1:
            del data[draw(st.integers(0, len(data))) :]
        case 2:
            data += draw(st.binary(max_size=5))
        case 3 if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        case 4:
            at = draw(st.integers(0, len(data)))
            data[at:at] = draw(st.binary(max_size=3))
    return bytes(data)


def _generated(message: type[Any], data: bytes) -> Any:
    """What a client made from the .proto sees: the chunk, the message, or nothing that can be parsed."""
    try:
        parsed = message.FromString(data)
    except DecodeError:
        return DecodeError
    return bytes(parsed.chunk) if parsed.WhichOneof("frame") == "chunk" else parsed


def _ours(parse: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        parsed = parse(data)
    except DecodeError:
        return DecodeError
    return bytes(parsed) if isinstance(parsed, memoryview) else parsed


def _agree(data: bytes) -> None:
    assert _ours(parse_push, data) == _generated(pb.PushRequest, data)
    assert _ours(parse_pull, data) == _generated(pb.PullResponse, data)


@given(
    header=st.builds(pb.UpdateHeader, worker=st.integers(0, 2**32 - 1), base_digest=st.binary(max_size=40)),
    payload=st.binary(max_size=300),
    digest_=st.binary(max_size=40),
)
@example(header=pb.UpdateHeader(), payload=bytes(70_000), digest_=b"")
def test_a_whole_update_is_what_protobuf_reads(header: pb.UpdateHeader, payload: bytes, digest_: bytes) -> None:
    update = pb.Update(header=header, payload=payload, trailer=pb.UpdateTrailer(digest=digest_))

    frame = update_frame(header, memoryview(payload), update.trailer)

    assert pb.PushRequest.FromString(frame) == pb.PushRequest(update=update)
    assert parse_push(frame) == pb.PushRequest(update=update)


@given(st.binary(max_size=400))
@example(b"")
@example(b"\x12")
@example(b"\x12\x00")
@example(b"\x12\x80\x00")  # length 0 in two bytes: legal, not minimal
@example(b"\x12\x01")
@example(b"\x12\x00\x12\x01a")  # the last of two chunks wins
@example(b"\x12\x01a\x0a\x00")  # a chunk, then an empty header: the header wins
@example(b"\x12\x01a\x20\x01")  # a chunk and a field that nobody knows
@example(b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
@example(b"\x12\xff\xff\xff\xff\x0f" + b"a" * 15)
@example(b"\x12\x8f\x80\x80\x80\x80\x00" + b"a" * 15)
@example(b"\x92\x00\x01a")  # the tag itself in two bytes
def test_both_parsers_agree_on_any_bytes(data: bytes) -> None:
    _agree(data)


@given(mutated())
def test_both_parsers_agree_on_damaged_frames(data: bytes) -> None:
    _agree(data)


@given(st.integers(0, 2**35), st.integers(-2, 2), st.binary(max_size=8))
def test_both_parsers_agree_on_announced_lengths_that_are_wrong(length: int, off: int, payload: bytes) -> None:
    _agree(b"\x12" + varint(length) + payload)
    _agree(b"\x12" + varint(max(0, len(payload) + off)) + payload)


@pytest.mark.parametrize("size", [127, 128, 16_383, 16_384, (1 << 21) - 1, 1 << 21, SEVERAL_MIB])
@pytest.mark.parametrize("wrong", [-1, 0, 1])
def test_both_parsers_agree_on_large_chunks(size: int, wrong: int) -> None:
    data = b"\x12" + varint(size + wrong) + bytes(size)
    _agree(data)
    assert (chunk_of(data) is not None) == (wrong == 0)


@given(payloads)
def test_a_chunk_frame_is_what_protobuf_writes(payload: bytes) -> None:
    frame = chunk_frame(payload)
    assert frame == chunk_frame(memoryview(payload))
    assert frame == pb.PushRequest(chunk=payload).SerializeToString()
    assert frame == pb.PullResponse(chunk=payload).SerializeToString()
    assert chunk_of(frame) == payload


def test_a_chunk_of_several_mib_is_what_protobuf_writes() -> None:
    payload = bytes(range(256)) * (SEVERAL_MIB // 256)
    assert chunk_frame(payload) == pb.PushRequest(chunk=payload).SerializeToString()
    chunk = chunk_of(chunk_frame(payload))
    assert chunk is not None
    assert bytes(chunk) == payload


def test_a_chunk_is_a_view_of_its_frame() -> None:
    """No copy: the payload is read where gRPC put it."""
    frame = chunk_frame(b"payload")
    chunk = chunk_of(frame)
    assert chunk is not None
    assert chunk.obj is frame


def test_a_length_that_is_not_minimal_goes_to_the_generated_parser() -> None:
    assert chunk_of(b"\x12\x01a") == b"a"
    assert chunk_of(b"\x12\x81\x00a") is None
    assert chunk_of(b"\x12\x80\x00") is None
    assert parse_push(b"\x12\x81\x00a") == b"a"


@given(push_requests)
def test_only_chunks_take_the_fast_path(data: bytes) -> None:
    message = pb.PushRequest.FromString(data)
    assert (chunk_of(data) is not None) == (message.WhichOneof("frame") == "chunk")


@given(numbers)
def test_varint_is_minimal(value: int) -> None:
    encoded = pb.PushResponse(round=value).SerializeToString()
    assert encoded == (b"\x10" + varint(value) if value else b"")


@given(st.binary(max_size=500), st.integers(1, 80))
def test_chunk_frames_cut_a_payload(payload: bytes, size: int) -> None:
    pieces = [chunk_of(frame) for frame in chunk_frames(memoryview(payload), size)]
    assert b"".join(bytes(piece) for piece in pieces if piece is not None) == payload
    assert [len(piece) for piece in pieces[:-1] if piece is not None] == [size] * (len(pieces) - 1)
    assert all(piece is not None and 1 <= len(piece) <= size for piece in pieces)


ALGORITHMS = {"blake3": lambda data: blake3.blake3(data).digest(), "sha256": lambda data: hashlib.sha256(data).digest()}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(pieces=st.lists(st.binary(max_size=200), max_size=5))
def test_a_digest_depends_on_the_bytes_only(algorithm: str, pieces: list[bytes]) -> None:
    state = hasher(algorithm)
    for piece in pieces:
        state.update(memoryview(piece))
    whole = b"".join(pieces)
    assert state.digest() == digest(algorithm, whole) == ALGORITHMS[algorithm](whole)
    assert len(state.digest()) == 32


def test_known_digests() -> None:
    """The test vectors of the two specifications for the empty input."""
    assert digest("blake3", b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert digest("sha256", b"").hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_everything_public_is_listed() -> None:
    assert set(codec.__all__) <= set(vars(codec))
