import datetime

from fedgrpc.v1 import aggregator_pb2 as _aggregator_pb2
from fedgrpc.v1 import round_pb2 as _round_pb2
from fedgrpc.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReleasePhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RELEASE_PHASE_UNSPECIFIED: _ClassVar[ReleasePhase]
    RELEASE_PHASE_CANARY: _ClassVar[ReleasePhase]
    RELEASE_PHASE_ROLLOUT: _ClassVar[ReleasePhase]
    RELEASE_PHASE_DONE: _ClassVar[ReleasePhase]
    RELEASE_PHASE_ROLLED_BACK: _ClassVar[ReleasePhase]
    RELEASE_PHASE_ABORTED: _ClassVar[ReleasePhase]
RELEASE_PHASE_UNSPECIFIED: ReleasePhase
RELEASE_PHASE_CANARY: ReleasePhase
RELEASE_PHASE_ROLLOUT: ReleasePhase
RELEASE_PHASE_DONE: ReleasePhase
RELEASE_PHASE_ROLLED_BACK: ReleasePhase
RELEASE_PHASE_ABORTED: ReleasePhase

class VersionRecord(_message.Message):
    __slots__ = ("version", "size_bytes", "tags", "best", "latest", "release", "written_at")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    LATEST_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_AT_FIELD_NUMBER: _ClassVar[int]
    version: _round_pb2.ModelVersion
    size_bytes: int
    tags: _containers.RepeatedScalarFieldContainer[str]
    best: bool
    latest: bool
    release: int
    written_at: _timestamp_pb2.Timestamp
    def __init__(self, version: _Optional[_Union[_round_pb2.ModelVersion, _Mapping]] = ..., size_bytes: _Optional[int] = ..., tags: _Optional[_Iterable[str]] = ..., best: _Optional[bool] = ..., latest: _Optional[bool] = ..., release: _Optional[int] = ..., written_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ListVersionsRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class ListVersionsResponse(_message.Message):
    __slots__ = ("run", "run_id", "learning_task", "versions")
    RUN_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LEARNING_TASK_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    run: str
    run_id: str
    learning_task: str
    versions: _containers.RepeatedCompositeFieldContainer[VersionRecord]
    def __init__(self, run: _Optional[str] = ..., run_id: _Optional[str] = ..., learning_task: _Optional[str] = ..., versions: _Optional[_Iterable[_Union[VersionRecord, _Mapping]]] = ...) -> None: ...

class GetVersionRequest(_message.Message):
    __slots__ = ("run", "version")
    RUN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    run: str
    version: str
    def __init__(self, run: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class GetVersionResponse(_message.Message):
    __slots__ = ("run", "run_id", "learning_task", "version")
    RUN_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LEARNING_TASK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    run: str
    run_id: str
    learning_task: str
    version: VersionRecord
    def __init__(self, run: _Optional[str] = ..., run_id: _Optional[str] = ..., learning_task: _Optional[str] = ..., version: _Optional[_Union[VersionRecord, _Mapping]] = ...) -> None: ...

class PullVersionRequest(_message.Message):
    __slots__ = ("run", "version", "offset", "worker")
    RUN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    run: str
    version: int
    offset: int
    worker: str
    def __init__(self, run: _Optional[str] = ..., version: _Optional[int] = ..., offset: _Optional[int] = ..., worker: _Optional[str] = ...) -> None: ...

class PullVersionResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: _aggregator_pb2.ModelHeader
    chunk: _tensor_pb2.Chunk
    def __init__(self, header: _Optional[_Union[_aggregator_pb2.ModelHeader, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ...) -> None: ...

class TagVersionRequest(_message.Message):
    __slots__ = ("run", "version", "tag", "remove")
    RUN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FIELD_NUMBER: _ClassVar[int]
    run: str
    version: str
    tag: str
    remove: bool
    def __init__(self, run: _Optional[str] = ..., version: _Optional[str] = ..., tag: _Optional[str] = ..., remove: _Optional[bool] = ...) -> None: ...

class TagVersionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ScoreCondition(_message.Message):
    __slots__ = ("name", "value", "at_least")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    at_least: bool
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ..., at_least: _Optional[bool] = ...) -> None: ...

class DeviceReport(_message.Message):
    __slots__ = ("worker", "first_at", "scores", "failure")
    class ScoresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    WORKER_FIELD_NUMBER: _ClassVar[int]
    FIRST_AT_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    first_at: _timestamp_pb2.Timestamp
    scores: _containers.ScalarMap[str, float]
    failure: str
    def __init__(self, worker: _Optional[str] = ..., first_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., scores: _Optional[_Mapping[str, float]] = ..., failure: _Optional[str] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("number", "run", "version", "previous", "phase", "reason", "started_by", "started_at", "entered_at", "after", "within", "conditions", "canaries", "reports", "report_count")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STARTED_BY_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    ENTERED_AT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    WITHIN_FIELD_NUMBER: _ClassVar[int]
    CONDITIONS_FIELD_NUMBER: _ClassVar[int]
    CANARIES_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    REPORT_COUNT_FIELD_NUMBER: _ClassVar[int]
    number: int
    run: str
    version: int
    previous: int
    phase: ReleasePhase
    reason: str
    started_by: str
    started_at: _timestamp_pb2.Timestamp
    entered_at: _timestamp_pb2.Timestamp
    after: _duration_pb2.Duration
    within: _duration_pb2.Duration
    conditions: _containers.RepeatedCompositeFieldContainer[ScoreCondition]
    canaries: _containers.RepeatedScalarFieldContainer[str]
    reports: _containers.RepeatedCompositeFieldContainer[DeviceReport]
    report_count: int
    def __init__(self, number: _Optional[int] = ..., run: _Optional[str] = ..., version: _Optional[int] = ..., previous: _Optional[int] = ..., phase: _Optional[_Union[ReleasePhase, str]] = ..., reason: _Optional[str] = ..., started_by: _Optional[str] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., entered_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., after: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., within: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., conditions: _Optional[_Iterable[_Union[ScoreCondition, _Mapping]]] = ..., canaries: _Optional[_Iterable[str]] = ..., reports: _Optional[_Iterable[_Union[DeviceReport, _Mapping]]] = ..., report_count: _Optional[int] = ...) -> None: ...

class StartReleaseRequest(_message.Message):
    __slots__ = ("run", "version", "canary", "conditions", "after", "within")
    RUN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    CONDITIONS_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    WITHIN_FIELD_NUMBER: _ClassVar[int]
    run: str
    version: str
    canary: str
    conditions: _containers.RepeatedScalarFieldContainer[str]
    after: _duration_pb2.Duration
    within: _duration_pb2.Duration
    def __init__(self, run: _Optional[str] = ..., version: _Optional[str] = ..., canary: _Optional[str] = ..., conditions: _Optional[_Iterable[str]] = ..., after: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., within: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class StartReleaseResponse(_message.Message):
    __slots__ = ("release",)
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    release: Release
    def __init__(self, release: _Optional[_Union[Release, _Mapping]] = ...) -> None: ...

class AbortReleaseRequest(_message.Message):
    __slots__ = ("run", "number", "reason")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run: str
    number: int
    reason: str
    def __init__(self, run: _Optional[str] = ..., number: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class AbortReleaseResponse(_message.Message):
    __slots__ = ("release",)
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    release: Release
    def __init__(self, release: _Optional[_Union[Release, _Mapping]] = ...) -> None: ...

class ListReleasesRequest(_message.Message):
    __slots__ = ("run", "number")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    run: str
    number: int
    def __init__(self, run: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class ListReleasesResponse(_message.Message):
    __slots__ = ("releases",)
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    releases: _containers.RepeatedCompositeFieldContainer[Release]
    def __init__(self, releases: _Optional[_Iterable[_Union[Release, _Mapping]]] = ...) -> None: ...

class ServedVersion(_message.Message):
    __slots__ = ("run_id", "version", "release", "score_interval", "run", "without_scores")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SCORE_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_SCORES_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    version: int
    release: int
    score_interval: _duration_pb2.Duration
    run: str
    without_scores: bool
    def __init__(self, run_id: _Optional[str] = ..., version: _Optional[int] = ..., release: _Optional[int] = ..., score_interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., run: _Optional[str] = ..., without_scores: _Optional[bool] = ...) -> None: ...

class FollowReleasesRequest(_message.Message):
    __slots__ = ("worker", "served", "wait")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    worker: str
    served: _containers.RepeatedCompositeFieldContainer[ServedVersion]
    wait: _duration_pb2.Duration
    def __init__(self, worker: _Optional[str] = ..., served: _Optional[_Iterable[_Union[ServedVersion, _Mapping]]] = ..., wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class FollowReleasesResponse(_message.Message):
    __slots__ = ("wanted",)
    WANTED_FIELD_NUMBER: _ClassVar[int]
    wanted: _containers.RepeatedCompositeFieldContainer[ServedVersion]
    def __init__(self, wanted: _Optional[_Iterable[_Union[ServedVersion, _Mapping]]] = ...) -> None: ...

class ReportReleaseRequest(_message.Message):
    __slots__ = ("worker", "run_id", "release", "scores", "failure")
    class ScoresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    WORKER_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    run_id: str
    release: int
    scores: _containers.ScalarMap[str, float]
    failure: str
    def __init__(self, worker: _Optional[str] = ..., run_id: _Optional[str] = ..., release: _Optional[int] = ..., scores: _Optional[_Mapping[str, float]] = ..., failure: _Optional[str] = ...) -> None: ...

class ReportReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
