from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]

class DigestAlgorithm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DIGEST_ALGORITHM_UNSPECIFIED: _ClassVar[DigestAlgorithm]
    DIGEST_ALGORITHM_BLAKE3: _ClassVar[DigestAlgorithm]
    DIGEST_ALGORITHM_SHA256: _ClassVar[DigestAlgorithm]

class UpdateKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPDATE_KIND_UNSPECIFIED: _ClassVar[UpdateKind]
    UPDATE_KIND_GRADIENT: _ClassVar[UpdateKind]
    UPDATE_KIND_PARAMETERS: _ClassVar[UpdateKind]

class NoticeKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NOTICE_KIND_UNSPECIFIED: _ClassVar[NoticeKind]
    NOTICE_KIND_WAITING: _ClassVar[NoticeKind]
    NOTICE_KIND_RUN_FINISHED: _ClassVar[NoticeKind]
    NOTICE_KIND_DRAINING: _ClassVar[NoticeKind]
    NOTICE_KIND_NO_MORE_RUNS: _ClassVar[NoticeKind]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DIGEST_ALGORITHM_UNSPECIFIED: DigestAlgorithm
DIGEST_ALGORITHM_BLAKE3: DigestAlgorithm
DIGEST_ALGORITHM_SHA256: DigestAlgorithm
UPDATE_KIND_UNSPECIFIED: UpdateKind
UPDATE_KIND_GRADIENT: UpdateKind
UPDATE_KIND_PARAMETERS: UpdateKind
NOTICE_KIND_UNSPECIFIED: NoticeKind
NOTICE_KIND_WAITING: NoticeKind
NOTICE_KIND_RUN_FINISHED: NoticeKind
NOTICE_KIND_DRAINING: NoticeKind
NOTICE_KIND_NO_MORE_RUNS: NoticeKind

class JoinRequest(_message.Message):
    __slots__ = ("workers", "software")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedScalarFieldContainer[int]
    software: str
    def __init__(self, workers: _Optional[_Iterable[int]] = ..., software: _Optional[str] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("task", "notice", "session")
    TASK_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    task: Task
    notice: Notice
    session: bytes
    def __init__(self, task: _Optional[_Union[Task, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ..., session: _Optional[bytes] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("run_id", "run_name", "n", "rounds", "model", "dataset", "partition", "batch", "update", "seed", "learning_rate", "fading", "dimension", "layout", "chunk_bytes", "dtype", "digest", "signature", "local_steps", "local_momentum", "local_l2", "micro_batch")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_NAME_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    FADING_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    LOCAL_L2_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    run_name: str
    n: int
    rounds: int
    model: str
    dataset: str
    partition: str
    batch: int
    update: UpdateKind
    seed: int
    learning_rate: float
    fading: float
    dimension: int
    layout: bytes
    chunk_bytes: int
    dtype: DataType
    digest: DigestAlgorithm
    signature: bytes
    local_steps: int
    local_momentum: float
    local_l2: float
    micro_batch: int
    def __init__(self, run_id: _Optional[bytes] = ..., run_name: _Optional[str] = ..., n: _Optional[int] = ..., rounds: _Optional[int] = ..., model: _Optional[str] = ..., dataset: _Optional[str] = ..., partition: _Optional[str] = ..., batch: _Optional[int] = ..., update: _Optional[_Union[UpdateKind, str]] = ..., seed: _Optional[int] = ..., learning_rate: _Optional[float] = ..., fading: _Optional[float] = ..., dimension: _Optional[int] = ..., layout: _Optional[bytes] = ..., chunk_bytes: _Optional[int] = ..., dtype: _Optional[_Union[DataType, str]] = ..., digest: _Optional[_Union[DigestAlgorithm, str]] = ..., signature: _Optional[bytes] = ..., local_steps: _Optional[int] = ..., local_momentum: _Optional[float] = ..., local_l2: _Optional[float] = ..., micro_batch: _Optional[int] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("kind", "message")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    kind: NoticeKind
    message: str
    def __init__(self, kind: _Optional[_Union[NoticeKind, str]] = ..., message: _Optional[str] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("run_id", "after_round")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_ROUND_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    after_round: int
    def __init__(self, run_id: _Optional[bytes] = ..., after_round: _Optional[int] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: RoundHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[RoundHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class RoundHeader(_message.Message):
    __slots__ = ("run_id", "round", "not_modified", "finished", "n", "f", "rule", "closes_in_ms", "durable_round", "digest", "signature", "byte_length", "dtype")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NOT_MODIFIED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    F_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    CLOSES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_ROUND_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    BYTE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    round: int
    not_modified: bool
    finished: bool
    n: int
    f: int
    rule: str
    closes_in_ms: int
    durable_round: int
    digest: bytes
    signature: bytes
    byte_length: int
    dtype: DataType
    def __init__(self, run_id: _Optional[bytes] = ..., round: _Optional[int] = ..., not_modified: bool = ..., finished: bool = ..., n: _Optional[int] = ..., f: _Optional[int] = ..., rule: _Optional[str] = ..., closes_in_ms: _Optional[int] = ..., durable_round: _Optional[int] = ..., digest: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., byte_length: _Optional[int] = ..., dtype: _Optional[_Union[DataType, str]] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("header", "chunk", "trailer", "update")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    TRAILER_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    header: UpdateHeader
    chunk: bytes
    trailer: UpdateTrailer
    update: Update
    def __init__(self, header: _Optional[_Union[UpdateHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., trailer: _Optional[_Union[UpdateTrailer, _Mapping]] = ..., update: _Optional[_Union[Update, _Mapping]] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("header", "payload", "trailer")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    TRAILER_FIELD_NUMBER: _ClassVar[int]
    header: UpdateHeader
    payload: bytes
    trailer: UpdateTrailer
    def __init__(self, header: _Optional[_Union[UpdateHeader, _Mapping]] = ..., payload: _Optional[bytes] = ..., trailer: _Optional[_Union[UpdateTrailer, _Mapping]] = ...) -> None: ...

class UpdateHeader(_message.Message):
    __slots__ = ("run_id", "worker", "round", "base_digest", "dtype", "byte_length")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BYTE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    worker: int
    round: int
    base_digest: bytes
    dtype: DataType
    byte_length: int
    def __init__(self, run_id: _Optional[bytes] = ..., worker: _Optional[int] = ..., round: _Optional[int] = ..., base_digest: _Optional[bytes] = ..., dtype: _Optional[_Union[DataType, str]] = ..., byte_length: _Optional[int] = ...) -> None: ...

class UpdateTrailer(_message.Message):
    __slots__ = ("digest", "signature")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    signature: bytes
    def __init__(self, digest: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("worker", "round", "code", "reason", "message", "duplicate", "current_round")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    CURRENT_ROUND_FIELD_NUMBER: _ClassVar[int]
    worker: int
    round: int
    code: int
    reason: str
    message: str
    duplicate: bool
    current_round: int
    def __init__(self, worker: _Optional[int] = ..., round: _Optional[int] = ..., code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., duplicate: bool = ..., current_round: _Optional[int] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
