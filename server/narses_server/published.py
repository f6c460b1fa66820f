"""A round's parameters as every pull gets them: encoded once, shared by all replies."""

from __future__ import annotations

from dataclasses import dataclass

from narses.rpc.codec import chunk_frames
from narses.rpc.digest import digest
from narses.rpc.v1 import parameter_server_pb2 as pb


@dataclass(frozen=True)
class Published:
    """Round `round`, its parameters' digest and their chunk frames; finished: no update is expected any more."""

    round: int
    digest: bytes
    frames: tuple[bytes, ...]
    byte_length: int
    finished: bool = False

    @classmethod
    def of(cls, round_: int, payload: memoryview, algorithm: str, chunk_bytes: int) -> Published:
        """Encode `payload` (the bytes of (D,) little-endian float32)."""
        frames = tuple(chunk_frames(payload, chunk_bytes))
        return cls(round_, digest(algorithm, payload), frames, len(payload))

    def header(self, run_id: bytes, n: int, f: int, rule: str, closes_in: float, durable: int | None) -> pb.RoundHeader:
        """The header of a reply sent `closes_in` seconds before the deadline; durable: the last round that is on disk."""
        return pb.RoundHeader(
            run_id=run_id,
            round=self.round,
            finished=self.finished,
            n=n,
            f=f,
            rule=rule,
            closes_in_ms=max(0, int(closes_in * 1000)),
            digest=self.digest,
            byte_length=self.byte_length,
            dtype=pb.DATA_TYPE_FLOAT32,
            durable_round=durable,
        )
