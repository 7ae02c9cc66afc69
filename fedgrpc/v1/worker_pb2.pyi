from fedgrpc.v1 import aggregator_pb2 as _aggregator_pb2
from fedgrpc.v1 import device_pb2 as _device_pb2
from fedgrpc.v1 import round_pb2 as _round_pb2
from fedgrpc.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Activity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTIVITY_UNSPECIFIED: _ClassVar[Activity]
    ACTIVITY_CONNECTING: _ClassVar[Activity]
    ACTIVITY_WAITING: _ClassVar[Activity]
    ACTIVITY_DOWNLOADING: _ClassVar[Activity]
    ACTIVITY_TRAINING: _ClassVar[Activity]
    ACTIVITY_EVALUATING: _ClassVar[Activity]
    ACTIVITY_UPLOADING: _ClassVar[Activity]
    ACTIVITY_PAUSED: _ClassVar[Activity]
    ACTIVITY_DRAINING: _ClassVar[Activity]
ACTIVITY_UNSPECIFIED: Activity
ACTIVITY_CONNECTING: Activity
ACTIVITY_WAITING: Activity
ACTIVITY_DOWNLOADING: Activity
ACTIVITY_TRAINING: Activity
ACTIVITY_EVALUATING: Activity
ACTIVITY_UPLOADING: Activity
ACTIVITY_PAUSED: Activity
ACTIVITY_DRAINING: Activity

class Status(_message.Message):
    __slots__ = ("worker", "aggregator", "activity", "progress", "run", "round", "model_version", "device", "last_timings", "spooled_updates", "last_error", "task_kind", "notice", "served_version", "release")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    AGGREGATOR_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LAST_TIMINGS_FIELD_NUMBER: _ClassVar[int]
    SPOOLED_UPDATES_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    TASK_KIND_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    SERVED_VERSION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    aggregator: str
    activity: Activity
    progress: float
    run: str
    round: int
    model_version: int
    device: _device_pb2.DeviceProfile
    last_timings: _device_pb2.Timings
    spooled_updates: int
    last_error: str
    task_kind: _round_pb2.TaskKind
    notice: str
    served_version: int
    release: int
    def __init__(self, worker: _Optional[str] = ..., aggregator: _Optional[str] = ..., activity: _Optional[_Union[Activity, str]] = ..., progress: _Optional[float] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., model_version: _Optional[int] = ..., device: _Optional[_Union[_device_pb2.DeviceProfile, _Mapping]] = ..., last_timings: _Optional[_Union[_device_pb2.Timings, _Mapping]] = ..., spooled_updates: _Optional[int] = ..., last_error: _Optional[str] = ..., task_kind: _Optional[_Union[_round_pb2.TaskKind, str]] = ..., notice: _Optional[str] = ..., served_version: _Optional[int] = ..., release: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: Status
    def __init__(self, status: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchStatusResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: Status
    def __init__(self, status: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...

class WorkerPullModelRequest(_message.Message):
    __slots__ = ("offset", "run", "digest")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    offset: int
    run: str
    digest: bytes
    def __init__(self, offset: _Optional[int] = ..., run: _Optional[str] = ..., digest: _Optional[bytes] = ...) -> None: ...

class WatchModelRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class WatchModelResponse(_message.Message):
    __slots__ = ("header", "run_id", "release")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    header: _aggregator_pb2.ModelHeader
    run_id: str
    release: int
    def __init__(self, header: _Optional[_Union[_aggregator_pb2.ModelHeader, _Mapping]] = ..., run_id: _Optional[str] = ..., release: _Optional[int] = ...) -> None: ...

class WorkerPullModelResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: _aggregator_pb2.ModelHeader
    chunk: _tensor_pb2.Chunk
    def __init__(self, header: _Optional[_Union[_aggregator_pb2.ModelHeader, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ...) -> None: ...

class StoredModel(_message.Message):
    __slots__ = ("run_id", "sub_model", "header", "origin_digest", "crc32")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SUB_MODEL_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    sub_model: str
    header: _aggregator_pb2.ModelHeader
    origin_digest: bytes
    crc32: int
    def __init__(self, run_id: _Optional[str] = ..., sub_model: _Optional[str] = ..., header: _Optional[_Union[_aggregator_pb2.ModelHeader, _Mapping]] = ..., origin_digest: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class StoredRelease(_message.Message):
    __slots__ = ("run_id", "run", "version", "release", "previous")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    run: str
    version: int
    release: int
    previous: int
    def __init__(self, run_id: _Optional[str] = ..., run: _Optional[str] = ..., version: _Optional[int] = ..., release: _Optional[int] = ..., previous: _Optional[int] = ...) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PauseResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: Status
    def __init__(self, status: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: Status
    def __init__(self, status: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: Status
    def __init__(self, status: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...
