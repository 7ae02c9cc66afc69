import datetime

from fedgrpc.v1 import device_pb2 as _device_pb2
from fedgrpc.v1 import privacy_pb2 as _privacy_pb2
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

class RunPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_PHASE_UNSPECIFIED: _ClassVar[RunPhase]
    RUN_PHASE_RUNNING: _ClassVar[RunPhase]
    RUN_PHASE_PAUSED: _ClassVar[RunPhase]
    RUN_PHASE_FINISHED: _ClassVar[RunPhase]
    RUN_PHASE_STOPPED: _ClassVar[RunPhase]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_IDLE: _ClassVar[WorkerState]
    WORKER_STATE_BUSY: _ClassVar[WorkerState]
    WORKER_STATE_AWAY: _ClassVar[WorkerState]
    WORKER_STATE_REVOKED: _ClassVar[WorkerState]
RUN_PHASE_UNSPECIFIED: RunPhase
RUN_PHASE_RUNNING: RunPhase
RUN_PHASE_PAUSED: RunPhase
RUN_PHASE_FINISHED: RunPhase
RUN_PHASE_STOPPED: RunPhase
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_IDLE: WorkerState
WORKER_STATE_BUSY: WorkerState
WORKER_STATE_AWAY: WorkerState
WORKER_STATE_REVOKED: WorkerState

class GetPrivacyRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class GetPrivacyResponse(_message.Message):
    __slots__ = ("ledger",)
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    ledger: _privacy_pb2.PrivacyLedger
    def __init__(self, ledger: _Optional[_Union[_privacy_pb2.PrivacyLedger, _Mapping]] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("worker", "role", "device", "encodings", "compressions", "local_model_parts", "many_runs")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSIONS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_MODEL_PARTS_FIELD_NUMBER: _ClassVar[int]
    MANY_RUNS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    role: _device_pb2.WorkerRole
    device: _device_pb2.DeviceProfile
    encodings: _containers.RepeatedScalarFieldContainer[str]
    compressions: _containers.RepeatedScalarFieldContainer[_tensor_pb2.Compression]
    local_model_parts: _containers.RepeatedScalarFieldContainer[str]
    many_runs: bool
    def __init__(self, worker: _Optional[str] = ..., role: _Optional[_Union[_device_pb2.WorkerRole, str]] = ..., device: _Optional[_Union[_device_pb2.DeviceProfile, _Mapping]] = ..., encodings: _Optional[_Iterable[str]] = ..., compressions: _Optional[_Iterable[_Union[_tensor_pb2.Compression, str]]] = ..., local_model_parts: _Optional[_Iterable[str]] = ..., many_runs: _Optional[bool] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("run", "poll_wait", "heartbeat_interval", "lease", "max_chunk_bytes", "max_payload_bytes", "learning_task", "model", "run_id", "describe_model", "tell_channels", "options", "without_metrics")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    POLL_WAIT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEARNING_TASK_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    DESCRIBE_MODEL_FIELD_NUMBER: _ClassVar[int]
    TELL_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_METRICS_FIELD_NUMBER: _ClassVar[int]
    run: str
    poll_wait: _duration_pb2.Duration
    heartbeat_interval: _duration_pb2.Duration
    lease: _duration_pb2.Duration
    max_chunk_bytes: int
    max_payload_bytes: int
    learning_task: str
    model: str
    run_id: str
    describe_model: bool
    tell_channels: bool
    options: _containers.ScalarMap[str, str]
    without_metrics: bool
    def __init__(self, run: _Optional[str] = ..., poll_wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., heartbeat_interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_chunk_bytes: _Optional[int] = ..., max_payload_bytes: _Optional[int] = ..., learning_task: _Optional[str] = ..., model: _Optional[str] = ..., run_id: _Optional[str] = ..., describe_model: _Optional[bool] = ..., tell_channels: _Optional[bool] = ..., options: _Optional[_Mapping[str, str]] = ..., without_metrics: _Optional[bool] = ...) -> None: ...

class RunTerms(_message.Message):
    __slots__ = ("run", "run_id", "learning_task", "model", "options", "tell_channels", "without_metrics")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LEARNING_TASK_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    TELL_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_METRICS_FIELD_NUMBER: _ClassVar[int]
    run: str
    run_id: str
    learning_task: str
    model: str
    options: _containers.ScalarMap[str, str]
    tell_channels: bool
    without_metrics: bool
    def __init__(self, run: _Optional[str] = ..., run_id: _Optional[str] = ..., learning_task: _Optional[str] = ..., model: _Optional[str] = ..., options: _Optional[_Mapping[str, str]] = ..., tell_channels: _Optional[bool] = ..., without_metrics: _Optional[bool] = ...) -> None: ...

class DescribeModelRequest(_message.Message):
    __slots__ = ("worker", "model_bytes", "process_bytes", "activation_bytes", "channels", "run_id", "refusal", "killed")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MODEL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROCESS_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    KILLED_FIELD_NUMBER: _ClassVar[int]
    worker: str
    model_bytes: int
    process_bytes: int
    activation_bytes: int
    channels: _tensor_pb2.ChannelMap
    run_id: str
    refusal: str
    killed: _round_pb2.LocalModel
    def __init__(self, worker: _Optional[str] = ..., model_bytes: _Optional[int] = ..., process_bytes: _Optional[int] = ..., activation_bytes: _Optional[int] = ..., channels: _Optional[_Union[_tensor_pb2.ChannelMap, _Mapping]] = ..., run_id: _Optional[str] = ..., refusal: _Optional[str] = ..., killed: _Optional[_Union[_round_pb2.LocalModel, _Mapping]] = ...) -> None: ...

class DescribeModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PollTaskRequest(_message.Message):
    __slots__ = ("worker", "wait", "held_version", "held_digest", "new_examples", "held", "conditions", "model_bytes", "one_time_keys")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    HELD_VERSION_FIELD_NUMBER: _ClassVar[int]
    HELD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NEW_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    CONDITIONS_FIELD_NUMBER: _ClassVar[int]
    MODEL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ONE_TIME_KEYS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    wait: _duration_pb2.Duration
    held_version: int
    held_digest: bytes
    new_examples: int
    held: _containers.RepeatedCompositeFieldContainer[HeldOfRun]
    conditions: _device_pb2.DeviceConditions
    model_bytes: int
    one_time_keys: _privacy_pb2.OneTimeKeys
    def __init__(self, worker: _Optional[str] = ..., wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., held_version: _Optional[int] = ..., held_digest: _Optional[bytes] = ..., new_examples: _Optional[int] = ..., held: _Optional[_Iterable[_Union[HeldOfRun, _Mapping]]] = ..., conditions: _Optional[_Union[_device_pb2.DeviceConditions, _Mapping]] = ..., model_bytes: _Optional[int] = ..., one_time_keys: _Optional[_Union[_privacy_pb2.OneTimeKeys, _Mapping]] = ...) -> None: ...

class HeldOfRun(_message.Message):
    __slots__ = ("run_id", "held_version", "held_digest", "new_examples", "one_time_keys")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    HELD_VERSION_FIELD_NUMBER: _ClassVar[int]
    HELD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NEW_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    ONE_TIME_KEYS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    held_version: int
    held_digest: bytes
    new_examples: int
    one_time_keys: _privacy_pb2.OneTimeKeys
    def __init__(self, run_id: _Optional[str] = ..., held_version: _Optional[int] = ..., held_digest: _Optional[bytes] = ..., new_examples: _Optional[int] = ..., one_time_keys: _Optional[_Union[_privacy_pb2.OneTimeKeys, _Mapping]] = ...) -> None: ...

class PollTaskResponse(_message.Message):
    __slots__ = ("task", "run_ended", "introduce", "model", "question")
    TASK_FIELD_NUMBER: _ClassVar[int]
    RUN_ENDED_FIELD_NUMBER: _ClassVar[int]
    INTRODUCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    task: Task
    run_ended: bool
    introduce: RunTerms
    model: TaskModel
    question: _privacy_pb2.SecureQuestion
    def __init__(self, task: _Optional[_Union[Task, _Mapping]] = ..., run_ended: _Optional[bool] = ..., introduce: _Optional[_Union[RunTerms, _Mapping]] = ..., model: _Optional[_Union[TaskModel, _Mapping]] = ..., question: _Optional[_Union[_privacy_pb2.SecureQuestion, _Mapping]] = ...) -> None: ...

class TaskModel(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: ModelHeader
    chunk: _tensor_pb2.Chunk
    def __init__(self, header: _Optional[_Union[ModelHeader, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ...) -> None: ...

class PollTasksRequest(_message.Message):
    __slots__ = ("poll",)
    POLL_FIELD_NUMBER: _ClassVar[int]
    poll: PollTaskRequest
    def __init__(self, poll: _Optional[_Union[PollTaskRequest, _Mapping]] = ...) -> None: ...

class PollTasksResponse(_message.Message):
    __slots__ = ("answer",)
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    answer: PollTaskResponse
    def __init__(self, answer: _Optional[_Union[PollTaskResponse, _Mapping]] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("token", "run", "round", "kind", "model_version", "plan", "upload_recipe", "time_left", "run_id", "uplink_bytes_per_second", "seed", "evaluate", "local_model", "leaf", "terms", "privacy", "secure")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_RECIPE_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    UPLINK_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_MODEL_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    SECURE_FIELD_NUMBER: _ClassVar[int]
    token: str
    run: str
    round: int
    kind: _round_pb2.TaskKind
    model_version: int
    plan: _round_pb2.TrainingPlan
    upload_recipe: str
    time_left: _duration_pb2.Duration
    run_id: str
    uplink_bytes_per_second: float
    seed: int
    evaluate: bool
    local_model: _round_pb2.LocalModel
    leaf: _round_pb2.LeafInstructions
    terms: RunTerms
    privacy: _privacy_pb2.UpdatePrivacy
    secure: _privacy_pb2.SecureTask
    def __init__(self, token: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., kind: _Optional[_Union[_round_pb2.TaskKind, str]] = ..., model_version: _Optional[int] = ..., plan: _Optional[_Union[_round_pb2.TrainingPlan, _Mapping]] = ..., upload_recipe: _Optional[str] = ..., time_left: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., run_id: _Optional[str] = ..., uplink_bytes_per_second: _Optional[float] = ..., seed: _Optional[int] = ..., evaluate: _Optional[bool] = ..., local_model: _Optional[_Union[_round_pb2.LocalModel, _Mapping]] = ..., leaf: _Optional[_Union[_round_pb2.LeafInstructions, _Mapping]] = ..., terms: _Optional[_Union[RunTerms, _Mapping]] = ..., privacy: _Optional[_Union[_privacy_pb2.UpdatePrivacy, _Mapping]] = ..., secure: _Optional[_Union[_privacy_pb2.SecureTask, _Mapping]] = ...) -> None: ...

class PullModelRequest(_message.Message):
    __slots__ = ("worker", "token", "offset", "base_version", "base_digest", "version", "run")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    worker: str
    token: str
    offset: int
    base_version: int
    base_digest: bytes
    version: int
    run: str
    def __init__(self, worker: _Optional[str] = ..., token: _Optional[str] = ..., offset: _Optional[int] = ..., base_version: _Optional[int] = ..., base_digest: _Optional[bytes] = ..., version: _Optional[int] = ..., run: _Optional[str] = ...) -> None: ...

class PullModelResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: ModelHeader
    chunk: _tensor_pb2.Chunk
    def __init__(self, header: _Optional[_Union[ModelHeader, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ...) -> None: ...

class ModelHeader(_message.Message):
    __slots__ = ("version", "manifest", "base_version", "held_crc32", "sha256")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    HELD_CRC32_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    version: int
    manifest: _tensor_pb2.Manifest
    base_version: int
    held_crc32: int
    sha256: bytes
    def __init__(self, version: _Optional[int] = ..., manifest: _Optional[_Union[_tensor_pb2.Manifest, _Mapping]] = ..., base_version: _Optional[int] = ..., held_crc32: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("worker", "token", "phase", "progress")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    token: str
    phase: _round_pb2.TaskPhase
    progress: float
    def __init__(self, worker: _Optional[str] = ..., token: _Optional[str] = ..., phase: _Optional[_Union[_round_pb2.TaskPhase, str]] = ..., progress: _Optional[float] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("cancel", "reason", "time_left")
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_FIELD_NUMBER: _ClassVar[int]
    cancel: bool
    reason: str
    time_left: _duration_pb2.Duration
    def __init__(self, cancel: _Optional[bool] = ..., reason: _Optional[str] = ..., time_left: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ExchangePartsRequest(_message.Message):
    __slots__ = ("worker", "token", "shares", "proofs", "answers", "wait")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    PROOFS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    worker: str
    token: str
    shares: _privacy_pb2.SecureParts
    proofs: _privacy_pb2.SecureParts
    answers: _privacy_pb2.SecureParts
    wait: _duration_pb2.Duration
    def __init__(self, worker: _Optional[str] = ..., token: _Optional[str] = ..., shares: _Optional[_Union[_privacy_pb2.SecureParts, _Mapping]] = ..., proofs: _Optional[_Union[_privacy_pb2.SecureParts, _Mapping]] = ..., answers: _Optional[_Union[_privacy_pb2.SecureParts, _Mapping]] = ..., wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ExchangePartsResponse(_message.Message):
    __slots__ = ("ready", "roster", "parts")
    READY_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    roster: _containers.RepeatedScalarFieldContainer[str]
    parts: _privacy_pb2.SecureParts
    def __init__(self, ready: _Optional[bool] = ..., roster: _Optional[_Iterable[str]] = ..., parts: _Optional[_Union[_privacy_pb2.SecureParts, _Mapping]] = ...) -> None: ...

class PushUpdateRequest(_message.Message):
    __slots__ = ("header", "chunk", "beside", "whole")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    BESIDE_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    header: UpdateHeader
    chunk: _tensor_pb2.Chunk
    beside: SideStream
    whole: _tensor_pb2.Chunk
    def __init__(self, header: _Optional[_Union[UpdateHeader, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., beside: _Optional[_Union[SideStream, _Mapping]] = ..., whole: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ...) -> None: ...

class SideStream(_message.Message):
    __slots__ = ("worker", "token")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    worker: str
    token: str
    def __init__(self, worker: _Optional[str] = ..., token: _Optional[str] = ...) -> None: ...

class UpdateHeader(_message.Message):
    __slots__ = ("worker", "token", "manifest", "example_count", "steps", "metrics", "evaluation_metrics", "evaluation_example_count", "timings", "peak_memory_bytes", "channels", "merged_updates", "weight", "tensor_bytes", "accumulated_steps", "unchanged", "scores_of_sub_models", "scores_not_finite", "noise_ratio", "clipped")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class EvaluationMetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_METRICS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_EXAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    MERGED_UPDATES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATED_STEPS_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    SCORES_OF_SUB_MODELS_FIELD_NUMBER: _ClassVar[int]
    SCORES_NOT_FINITE_FIELD_NUMBER: _ClassVar[int]
    NOISE_RATIO_FIELD_NUMBER: _ClassVar[int]
    CLIPPED_FIELD_NUMBER: _ClassVar[int]
    worker: str
    token: str
    manifest: _tensor_pb2.Manifest
    example_count: int
    steps: int
    metrics: _containers.ScalarMap[str, float]
    evaluation_metrics: _containers.ScalarMap[str, float]
    evaluation_example_count: int
    timings: _device_pb2.Timings
    peak_memory_bytes: int
    channels: _tensor_pb2.ChannelMap
    merged_updates: int
    weight: float
    tensor_bytes: int
    accumulated_steps: float
    unchanged: bool
    scores_of_sub_models: bool
    scores_not_finite: _containers.RepeatedScalarFieldContainer[str]
    noise_ratio: float
    clipped: bool
    def __init__(self, worker: _Optional[str] = ..., token: _Optional[str] = ..., manifest: _Optional[_Union[_tensor_pb2.Manifest, _Mapping]] = ..., example_count: _Optional[int] = ..., steps: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., evaluation_metrics: _Optional[_Mapping[str, float]] = ..., evaluation_example_count: _Optional[int] = ..., timings: _Optional[_Union[_device_pb2.Timings, _Mapping]] = ..., peak_memory_bytes: _Optional[int] = ..., channels: _Optional[_Union[_tensor_pb2.ChannelMap, _Mapping]] = ..., merged_updates: _Optional[int] = ..., weight: _Optional[float] = ..., tensor_bytes: _Optional[int] = ..., accumulated_steps: _Optional[float] = ..., unchanged: _Optional[bool] = ..., scores_of_sub_models: _Optional[bool] = ..., scores_not_finite: _Optional[_Iterable[str]] = ..., noise_ratio: _Optional[float] = ..., clipped: _Optional[bool] = ...) -> None: ...

class PushUpdateResponse(_message.Message):
    __slots__ = ("committed_size_bytes", "complete")
    COMMITTED_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    committed_size_bytes: int
    complete: bool
    def __init__(self, committed_size_bytes: _Optional[int] = ..., complete: _Optional[bool] = ...) -> None: ...

class QueryPushRequest(_message.Message):
    __slots__ = ("worker", "token")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    worker: str
    token: str
    def __init__(self, worker: _Optional[str] = ..., token: _Optional[str] = ...) -> None: ...

class QueryPushResponse(_message.Message):
    __slots__ = ("committed_size_bytes", "complete", "retry_after")
    COMMITTED_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    committed_size_bytes: int
    complete: bool
    retry_after: _duration_pb2.Duration
    def __init__(self, committed_size_bytes: _Optional[int] = ..., complete: _Optional[bool] = ..., retry_after: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ReportFailureRequest(_message.Message):
    __slots__ = ("worker", "token", "reason")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    worker: str
    token: str
    reason: str
    def __init__(self, worker: _Optional[str] = ..., token: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ReportFailureResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("worker",)
    WORKER_FIELD_NUMBER: _ClassVar[int]
    worker: str
    def __init__(self, worker: _Optional[str] = ...) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Run(_message.Message):
    __slots__ = ("name", "phase", "reason", "model_version", "current_round", "total_rounds", "started_at", "software_version", "layout", "settings", "id", "local_models", "last", "best", "paused_reason", "policy", "ingest")
    class SettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CURRENT_ROUND_FIELD_NUMBER: _ClassVar[int]
    TOTAL_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    LOCAL_MODELS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    PAUSED_REASON_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    INGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    phase: RunPhase
    reason: str
    model_version: int
    current_round: int
    total_rounds: int
    started_at: _timestamp_pb2.Timestamp
    software_version: str
    layout: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    settings: _containers.ScalarMap[str, str]
    id: str
    local_models: _round_pb2.LocalModels
    last: _round_pb2.ModelVersion
    best: _round_pb2.ModelVersion
    paused_reason: str
    policy: _round_pb2.RoundPolicy
    ingest: IngestProcesses
    def __init__(self, name: _Optional[str] = ..., phase: _Optional[_Union[RunPhase, str]] = ..., reason: _Optional[str] = ..., model_version: _Optional[int] = ..., current_round: _Optional[int] = ..., total_rounds: _Optional[int] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., software_version: _Optional[str] = ..., layout: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ..., settings: _Optional[_Mapping[str, str]] = ..., id: _Optional[str] = ..., local_models: _Optional[_Union[_round_pb2.LocalModels, _Mapping]] = ..., last: _Optional[_Union[_round_pb2.ModelVersion, _Mapping]] = ..., best: _Optional[_Union[_round_pb2.ModelVersion, _Mapping]] = ..., paused_reason: _Optional[str] = ..., policy: _Optional[_Union[_round_pb2.RoundPolicy, _Mapping]] = ..., ingest: _Optional[_Union[IngestProcesses, _Mapping]] = ...) -> None: ...

class IngestProcesses(_message.Message):
    __slots__ = ("wanted", "serving", "restarts", "memory_bytes")
    WANTED_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    wanted: int
    serving: int
    restarts: int
    memory_bytes: int
    def __init__(self, wanted: _Optional[int] = ..., serving: _Optional[int] = ..., restarts: _Optional[int] = ..., memory_bytes: _Optional[int] = ...) -> None: ...

class GetRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class GetRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: Run
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ...) -> None: ...

class GetRoundRequest(_message.Message):
    __slots__ = ("number", "page_size", "page_token", "run")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    number: int
    page_size: int
    page_token: str
    run: str
    def __init__(self, number: _Optional[int] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., run: _Optional[str] = ...) -> None: ...

class GetRoundResponse(_message.Message):
    __slots__ = ("round", "next_page_token")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    round: _round_pb2.Round
    next_page_token: str
    def __init__(self, round: _Optional[_Union[_round_pb2.Round, _Mapping]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ListRoundsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "run")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    run: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., run: _Optional[str] = ...) -> None: ...

class ListRoundsResponse(_message.Message):
    __slots__ = ("rounds", "next_page_token")
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    rounds: _containers.RepeatedCompositeFieldContainer[_round_pb2.Round]
    next_page_token: str
    def __init__(self, rounds: _Optional[_Iterable[_Union[_round_pb2.Round, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchRoundsRequest(_message.Message):
    __slots__ = ("max_rate_hz", "run")
    MAX_RATE_HZ_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    max_rate_hz: float
    run: str
    def __init__(self, max_rate_hz: _Optional[float] = ..., run: _Optional[str] = ...) -> None: ...

class WatchRoundsResponse(_message.Message):
    __slots__ = ("run", "round")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    run: Run
    round: _round_pb2.Round
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ..., round: _Optional[_Union[_round_pb2.Round, _Mapping]] = ...) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "run")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    run: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., run: _Optional[str] = ...) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers", "next_page_token")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerRecord]
    next_page_token: str
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerRecord, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WorkerRecord(_message.Message):
    __slots__ = ("worker", "role", "device", "state", "last_seen_ago", "rounds_selected", "rounds_accepted", "task_phase", "progress", "expected_timings", "endings", "uplink_bytes_per_second", "downlink_bytes_per_second", "download_recipe", "upload_recipe", "difference_recipe", "run", "conditions", "eligible_for", "refusals", "new_examples")
    class EndingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class RefusalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_AGO_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_SELECTED_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    TASK_PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ENDINGS_FIELD_NUMBER: _ClassVar[int]
    UPLINK_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DOWNLINK_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_RECIPE_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_RECIPE_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_RECIPE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    CONDITIONS_FIELD_NUMBER: _ClassVar[int]
    ELIGIBLE_FOR_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    NEW_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    worker: str
    role: _device_pb2.WorkerRole
    device: _device_pb2.DeviceProfile
    state: WorkerState
    last_seen_ago: _duration_pb2.Duration
    rounds_selected: int
    rounds_accepted: int
    task_phase: _round_pb2.TaskPhase
    progress: float
    expected_timings: _device_pb2.Timings
    endings: _containers.ScalarMap[str, int]
    uplink_bytes_per_second: float
    downlink_bytes_per_second: float
    download_recipe: str
    upload_recipe: str
    difference_recipe: str
    run: str
    conditions: _device_pb2.DeviceConditions
    eligible_for: _containers.RepeatedScalarFieldContainer[str]
    refusals: _containers.ScalarMap[str, str]
    new_examples: int
    def __init__(self, worker: _Optional[str] = ..., role: _Optional[_Union[_device_pb2.WorkerRole, str]] = ..., device: _Optional[_Union[_device_pb2.DeviceProfile, _Mapping]] = ..., state: _Optional[_Union[WorkerState, str]] = ..., last_seen_ago: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., rounds_selected: _Optional[int] = ..., rounds_accepted: _Optional[int] = ..., task_phase: _Optional[_Union[_round_pb2.TaskPhase, str]] = ..., progress: _Optional[float] = ..., expected_timings: _Optional[_Union[_device_pb2.Timings, _Mapping]] = ..., endings: _Optional[_Mapping[str, int]] = ..., uplink_bytes_per_second: _Optional[float] = ..., downlink_bytes_per_second: _Optional[float] = ..., download_recipe: _Optional[str] = ..., upload_recipe: _Optional[str] = ..., difference_recipe: _Optional[str] = ..., run: _Optional[str] = ..., conditions: _Optional[_Union[_device_pb2.DeviceConditions, _Mapping]] = ..., eligible_for: _Optional[_Iterable[str]] = ..., refusals: _Optional[_Mapping[str, str]] = ..., new_examples: _Optional[int] = ...) -> None: ...

class PauseRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class PauseRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: Run
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ...) -> None: ...

class ResumeRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class ResumeRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: Run
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ...) -> None: ...

class RollBackRunRequest(_message.Message):
    __slots__ = ("version", "reason", "run")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    version: int
    reason: str
    run: str
    def __init__(self, version: _Optional[int] = ..., reason: _Optional[str] = ..., run: _Optional[str] = ...) -> None: ...

class RollBackRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: Run
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ...) -> None: ...

class StopRunRequest(_message.Message):
    __slots__ = ("reason", "run")
    REASON_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    reason: str
    run: str
    def __init__(self, reason: _Optional[str] = ..., run: _Optional[str] = ...) -> None: ...

class StopRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: Run
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ...) -> None: ...

class RunSummary(_message.Message):
    __slots__ = ("name", "id", "phase", "reason", "model_version", "current_round", "total_rounds", "started_at", "learning_task", "model", "requires", "priority", "quota", "eligible_workers", "busy_workers", "wanted_workers", "waiting", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CURRENT_ROUND_FIELD_NUMBER: _ClassVar[int]
    TOTAL_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    LEARNING_TASK_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REQUIRES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    ELIGIBLE_WORKERS_FIELD_NUMBER: _ClassVar[int]
    BUSY_WORKERS_FIELD_NUMBER: _ClassVar[int]
    WANTED_WORKERS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    name: str
    id: str
    phase: RunPhase
    reason: str
    model_version: int
    current_round: int
    total_rounds: int
    started_at: _timestamp_pb2.Timestamp
    learning_task: str
    model: str
    requires: str
    priority: int
    quota: int
    eligible_workers: int
    busy_workers: int
    wanted_workers: int
    waiting: _duration_pb2.Duration
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, name: _Optional[str] = ..., id: _Optional[str] = ..., phase: _Optional[_Union[RunPhase, str]] = ..., reason: _Optional[str] = ..., model_version: _Optional[int] = ..., current_round: _Optional[int] = ..., total_rounds: _Optional[int] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., learning_task: _Optional[str] = ..., model: _Optional[str] = ..., requires: _Optional[str] = ..., priority: _Optional[int] = ..., quota: _Optional[int] = ..., eligible_workers: _Optional[int] = ..., busy_workers: _Optional[int] = ..., wanted_workers: _Optional[int] = ..., waiting: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListRunsResponse(_message.Message):
    __slots__ = ("runs", "next_page_token")
    RUNS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunSummary]
    next_page_token: str
    def __init__(self, runs: _Optional[_Iterable[_Union[RunSummary, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class RunSetting(_message.Message):
    __slots__ = ("name", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., values: _Optional[_Iterable[str]] = ...) -> None: ...

class SubmitRunRequest(_message.Message):
    __slots__ = ("name", "settings")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    name: str
    settings: _containers.RepeatedCompositeFieldContainer[RunSetting]
    def __init__(self, name: _Optional[str] = ..., settings: _Optional[_Iterable[_Union[RunSetting, _Mapping]]] = ...) -> None: ...

class SubmitRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: Run
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ...) -> None: ...

class SetRunRequest(_message.Message):
    __slots__ = ("run", "settings")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    run: str
    settings: _containers.RepeatedCompositeFieldContainer[RunSetting]
    def __init__(self, run: _Optional[str] = ..., settings: _Optional[_Iterable[_Union[RunSetting, _Mapping]]] = ...) -> None: ...

class SetRunResponse(_message.Message):
    __slots__ = ("run", "changed")
    class ChangedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    run: Run
    changed: _containers.ScalarMap[str, str]
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ..., changed: _Optional[_Mapping[str, str]] = ...) -> None: ...

class CloneRunRequest(_message.Message):
    __slots__ = ("run", "name", "settings", "version")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    run: str
    name: str
    settings: _containers.RepeatedCompositeFieldContainer[RunSetting]
    version: int
    def __init__(self, run: _Optional[str] = ..., name: _Optional[str] = ..., settings: _Optional[_Iterable[_Union[RunSetting, _Mapping]]] = ..., version: _Optional[int] = ...) -> None: ...

class CloneRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: Run
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ...) -> None: ...

class RemoveRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class RemoveRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
