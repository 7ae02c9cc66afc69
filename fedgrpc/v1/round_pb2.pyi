import datetime

from fedgrpc.v1 import device_pb2 as _device_pb2
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

class TaskKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_KIND_UNSPECIFIED: _ClassVar[TaskKind]
    TASK_KIND_TRAIN: _ClassVar[TaskKind]
    TASK_KIND_EVALUATE: _ClassVar[TaskKind]
    TASK_KIND_INITIALIZE: _ClassVar[TaskKind]

class LatePolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LATE_POLICY_UNSPECIFIED: _ClassVar[LatePolicy]
    LATE_POLICY_DISCARD: _ClassVar[LatePolicy]
    LATE_POLICY_CARRY: _ClassVar[LatePolicy]

class RoundPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUND_PHASE_UNSPECIFIED: _ClassVar[RoundPhase]
    ROUND_PHASE_SELECTING: _ClassVar[RoundPhase]
    ROUND_PHASE_REPORTING: _ClassVar[RoundPhase]
    ROUND_PHASE_COMMITTING: _ClassVar[RoundPhase]
    ROUND_PHASE_COMMITTED: _ClassVar[RoundPhase]
    ROUND_PHASE_ABANDONED: _ClassVar[RoundPhase]

class TaskPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_PHASE_UNSPECIFIED: _ClassVar[TaskPhase]
    TASK_PHASE_OFFERED: _ClassVar[TaskPhase]
    TASK_PHASE_DOWNLOADING: _ClassVar[TaskPhase]
    TASK_PHASE_TRAINING: _ClassVar[TaskPhase]
    TASK_PHASE_UPLOADING: _ClassVar[TaskPhase]
    TASK_PHASE_ACCEPTED: _ClassVar[TaskPhase]
    TASK_PHASE_REJECTED: _ClassVar[TaskPhase]
    TASK_PHASE_FAILED: _ClassVar[TaskPhase]
    TASK_PHASE_EXPIRED: _ClassVar[TaskPhase]
    TASK_PHASE_LATE: _ClassVar[TaskPhase]

class LossCause(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOSS_CAUSE_UNSPECIFIED: _ClassVar[LossCause]
    LOSS_CAUSE_NO_SHOW: _ClassVar[LossCause]
    LOSS_CAUSE_SLOW_DOWNLOAD: _ClassVar[LossCause]
    LOSS_CAUSE_SLOW_TRAINING: _ClassVar[LossCause]
    LOSS_CAUSE_SLOW_UPLOAD: _ClassVar[LossCause]
    LOSS_CAUSE_REFUSED: _ClassVar[LossCause]
    LOSS_CAUSE_GIVEN_BACK: _ClassVar[LossCause]
    LOSS_CAUSE_LATE: _ClassVar[LossCause]

class Jump(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JUMP_UNSPECIFIED: _ClassVar[Jump]
    JUMP_NORM: _ClassVar[Jump]
    JUMP_SCORES: _ClassVar[Jump]
TASK_KIND_UNSPECIFIED: TaskKind
TASK_KIND_TRAIN: TaskKind
TASK_KIND_EVALUATE: TaskKind
TASK_KIND_INITIALIZE: TaskKind
LATE_POLICY_UNSPECIFIED: LatePolicy
LATE_POLICY_DISCARD: LatePolicy
LATE_POLICY_CARRY: LatePolicy
ROUND_PHASE_UNSPECIFIED: RoundPhase
ROUND_PHASE_SELECTING: RoundPhase
ROUND_PHASE_REPORTING: RoundPhase
ROUND_PHASE_COMMITTING: RoundPhase
ROUND_PHASE_COMMITTED: RoundPhase
ROUND_PHASE_ABANDONED: RoundPhase
TASK_PHASE_UNSPECIFIED: TaskPhase
TASK_PHASE_OFFERED: TaskPhase
TASK_PHASE_DOWNLOADING: TaskPhase
TASK_PHASE_TRAINING: TaskPhase
TASK_PHASE_UPLOADING: TaskPhase
TASK_PHASE_ACCEPTED: TaskPhase
TASK_PHASE_REJECTED: TaskPhase
TASK_PHASE_FAILED: TaskPhase
TASK_PHASE_EXPIRED: TaskPhase
TASK_PHASE_LATE: TaskPhase
LOSS_CAUSE_UNSPECIFIED: LossCause
LOSS_CAUSE_NO_SHOW: LossCause
LOSS_CAUSE_SLOW_DOWNLOAD: LossCause
LOSS_CAUSE_SLOW_TRAINING: LossCause
LOSS_CAUSE_SLOW_UPLOAD: LossCause
LOSS_CAUSE_REFUSED: LossCause
LOSS_CAUSE_GIVEN_BACK: LossCause
LOSS_CAUSE_LATE: LossCause
JUMP_UNSPECIFIED: Jump
JUMP_NORM: Jump
JUMP_SCORES: Jump

class RoundPolicy(_message.Message):
    __slots__ = ("min_workers", "min_sample_size", "max_participants", "fraction", "over_selection", "quorum", "deadline", "lease", "selection_window", "selection_timeout", "weight_aim", "max_share", "deadline_floor", "late", "max_staleness", "buffer_size", "reconnect_grace", "min_new_examples", "poisson_rate")
    MIN_WORKERS_FIELD_NUMBER: _ClassVar[int]
    MIN_SAMPLE_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_PARTICIPANTS_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    OVER_SELECTION_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    SELECTION_WINDOW_FIELD_NUMBER: _ClassVar[int]
    SELECTION_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_AIM_FIELD_NUMBER: _ClassVar[int]
    MAX_SHARE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FLOOR_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    MAX_STALENESS_FIELD_NUMBER: _ClassVar[int]
    BUFFER_SIZE_FIELD_NUMBER: _ClassVar[int]
    RECONNECT_GRACE_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    POISSON_RATE_FIELD_NUMBER: _ClassVar[int]
    min_workers: int
    min_sample_size: int
    max_participants: int
    fraction: float
    over_selection: float
    quorum: int
    deadline: _duration_pb2.Duration
    lease: _duration_pb2.Duration
    selection_window: _duration_pb2.Duration
    selection_timeout: _duration_pb2.Duration
    weight_aim: float
    max_share: float
    deadline_floor: _duration_pb2.Duration
    late: LatePolicy
    max_staleness: int
    buffer_size: int
    reconnect_grace: _duration_pb2.Duration
    min_new_examples: int
    poisson_rate: float
    def __init__(self, min_workers: _Optional[int] = ..., min_sample_size: _Optional[int] = ..., max_participants: _Optional[int] = ..., fraction: _Optional[float] = ..., over_selection: _Optional[float] = ..., quorum: _Optional[int] = ..., deadline: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., selection_window: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., selection_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., weight_aim: _Optional[float] = ..., max_share: _Optional[float] = ..., deadline_floor: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., late: _Optional[_Union[LatePolicy, str]] = ..., max_staleness: _Optional[int] = ..., buffer_size: _Optional[int] = ..., reconnect_grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., min_new_examples: _Optional[int] = ..., poisson_rate: _Optional[float] = ...) -> None: ...

class TrainingPlan(_message.Message):
    __slots__ = ("epochs", "max_steps", "batch_size", "learning_rate", "momentum", "algorithm", "label_adjustment", "upload_reserve", "weight_decay")
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    LABEL_ADJUSTMENT_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_RESERVE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    epochs: float
    max_steps: int
    batch_size: int
    learning_rate: float
    momentum: float
    algorithm: str
    label_adjustment: float
    upload_reserve: _duration_pb2.Duration
    weight_decay: float
    def __init__(self, epochs: _Optional[float] = ..., max_steps: _Optional[int] = ..., batch_size: _Optional[int] = ..., learning_rate: _Optional[float] = ..., momentum: _Optional[float] = ..., algorithm: _Optional[str] = ..., label_adjustment: _Optional[float] = ..., upload_reserve: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., weight_decay: _Optional[float] = ...) -> None: ...

class LeafInstructions(_message.Message):
    __slots__ = ("seed", "worker_weights", "local_models", "channels", "total_rounds", "max_examples", "clip_norm", "plain_weights", "secure")
    class WorkerWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SEED_FIELD_NUMBER: _ClassVar[int]
    WORKER_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_MODELS_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    MAX_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    PLAIN_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SECURE_FIELD_NUMBER: _ClassVar[int]
    seed: int
    worker_weights: _containers.ScalarMap[str, float]
    local_models: LocalModels
    channels: _tensor_pb2.ChannelMap
    total_rounds: int
    max_examples: int
    clip_norm: float
    plain_weights: bool
    secure: SecureGroups
    def __init__(self, seed: _Optional[int] = ..., worker_weights: _Optional[_Mapping[str, float]] = ..., local_models: _Optional[_Union[LocalModels, _Mapping]] = ..., channels: _Optional[_Union[_tensor_pb2.ChannelMap, _Mapping]] = ..., total_rounds: _Optional[int] = ..., max_examples: _Optional[int] = ..., clip_norm: _Optional[float] = ..., plain_weights: _Optional[bool] = ..., secure: _Optional[_Union[SecureGroups, _Mapping]] = ...) -> None: ...

class SecureGroups(_message.Message):
    __slots__ = ("bits", "weight_bits", "colluding")
    BITS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BITS_FIELD_NUMBER: _ClassVar[int]
    COLLUDING_FIELD_NUMBER: _ClassVar[int]
    bits: int
    weight_bits: int
    colluding: int
    def __init__(self, bits: _Optional[int] = ..., weight_bits: _Optional[int] = ..., colluding: _Optional[int] = ...) -> None: ...

class LocalModels(_message.Message):
    __slots__ = ("default", "classes", "automatic")
    class ClassesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: LocalModel
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[LocalModel, _Mapping]] = ...) -> None: ...
    DEFAULT_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    AUTOMATIC_FIELD_NUMBER: _ClassVar[int]
    default: LocalModel
    classes: _containers.MessageMap[str, LocalModel]
    automatic: _containers.RepeatedCompositeFieldContainer[LocalModel]
    def __init__(self, default: _Optional[_Union[LocalModel, _Mapping]] = ..., classes: _Optional[_Mapping[str, LocalModel]] = ..., automatic: _Optional[_Iterable[_Union[LocalModel, _Mapping]]] = ...) -> None: ...

class LocalModel(_message.Message):
    __slots__ = ("sub_model", "personal_layers", "pruning", "clustering", "quantization", "arithmetic", "nested_widths", "trained_layers", "memory", "distillation")
    SUB_MODEL_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_LAYERS_FIELD_NUMBER: _ClassVar[int]
    PRUNING_FIELD_NUMBER: _ClassVar[int]
    CLUSTERING_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    ARITHMETIC_FIELD_NUMBER: _ClassVar[int]
    NESTED_WIDTHS_FIELD_NUMBER: _ClassVar[int]
    TRAINED_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    DISTILLATION_FIELD_NUMBER: _ClassVar[int]
    sub_model: str
    personal_layers: _containers.RepeatedScalarFieldContainer[str]
    pruning: Pruning
    clustering: Clustering
    quantization: Quantization
    arithmetic: Arithmetic
    nested_widths: _containers.RepeatedScalarFieldContainer[float]
    trained_layers: _containers.RepeatedScalarFieldContainer[str]
    memory: Memory
    distillation: float
    def __init__(self, sub_model: _Optional[str] = ..., personal_layers: _Optional[_Iterable[str]] = ..., pruning: _Optional[_Union[Pruning, _Mapping]] = ..., clustering: _Optional[_Union[Clustering, _Mapping]] = ..., quantization: _Optional[_Union[Quantization, _Mapping]] = ..., arithmetic: _Optional[_Union[Arithmetic, _Mapping]] = ..., nested_widths: _Optional[_Iterable[float]] = ..., trained_layers: _Optional[_Iterable[str]] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ..., distillation: _Optional[float] = ...) -> None: ...

class Pruning(_message.Message):
    __slots__ = ("ratio", "across_layers", "layers")
    RATIO_FIELD_NUMBER: _ClassVar[int]
    ACROSS_LAYERS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    ratio: float
    across_layers: bool
    layers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ratio: _Optional[float] = ..., across_layers: _Optional[bool] = ..., layers: _Optional[_Iterable[str]] = ...) -> None: ...

class Clustering(_message.Message):
    __slots__ = ("clusters", "layers")
    CLUSTERS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    clusters: int
    layers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, clusters: _Optional[int] = ..., layers: _Optional[_Iterable[str]] = ...) -> None: ...

class Quantization(_message.Message):
    __slots__ = ("weight_bits", "activation_bits", "layers")
    WEIGHT_BITS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_BITS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    weight_bits: int
    activation_bits: int
    layers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, weight_bits: _Optional[int] = ..., activation_bits: _Optional[int] = ..., layers: _Optional[_Iterable[str]] = ...) -> None: ...

class Arithmetic(_message.Message):
    __slots__ = ("format", "stochastic_rounding", "emulated", "loss_scale", "dynamic_loss_scale", "float32_copy", "accumulate_in_format")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    STOCHASTIC_ROUNDING_FIELD_NUMBER: _ClassVar[int]
    EMULATED_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    DYNAMIC_LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    FLOAT32_COPY_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATE_IN_FORMAT_FIELD_NUMBER: _ClassVar[int]
    format: str
    stochastic_rounding: bool
    emulated: bool
    loss_scale: float
    dynamic_loss_scale: bool
    float32_copy: bool
    accumulate_in_format: bool
    def __init__(self, format: _Optional[str] = ..., stochastic_rounding: _Optional[bool] = ..., emulated: _Optional[bool] = ..., loss_scale: _Optional[float] = ..., dynamic_loss_scale: _Optional[bool] = ..., float32_copy: _Optional[bool] = ..., accumulate_in_format: _Optional[bool] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("micro_batches", "checkpoint", "no_momentum")
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    NO_MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    micro_batches: int
    checkpoint: bool
    no_momentum: bool
    def __init__(self, micro_batches: _Optional[int] = ..., checkpoint: _Optional[bool] = ..., no_momentum: _Optional[bool] = ...) -> None: ...

class TaskRecord(_message.Message):
    __slots__ = ("worker", "kind", "phase", "reason", "example_count", "weight", "metrics", "timings", "download_bytes", "upload_bytes", "progress", "device_class", "peak_memory_bytes", "local_model", "merged_updates", "steps", "staleness", "scale", "distance", "chosen", "prediction", "tensor_bytes", "download_recipe", "upload_recipe", "difference_recipe", "evaluation_metrics", "unchanged", "loss_cause", "noise_ratio")
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
    KIND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOCAL_MODEL_FIELD_NUMBER: _ClassVar[int]
    MERGED_UPDATES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_FIELD_NUMBER: _ClassVar[int]
    TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_RECIPE_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_RECIPE_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_RECIPE_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_METRICS_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    LOSS_CAUSE_FIELD_NUMBER: _ClassVar[int]
    NOISE_RATIO_FIELD_NUMBER: _ClassVar[int]
    worker: str
    kind: TaskKind
    phase: TaskPhase
    reason: str
    example_count: int
    weight: float
    metrics: _containers.ScalarMap[str, float]
    timings: _device_pb2.Timings
    download_bytes: int
    upload_bytes: int
    progress: float
    device_class: str
    peak_memory_bytes: int
    local_model: LocalModel
    merged_updates: int
    steps: int
    staleness: int
    scale: float
    distance: float
    chosen: str
    prediction: Prediction
    tensor_bytes: int
    download_recipe: str
    upload_recipe: str
    difference_recipe: str
    evaluation_metrics: _containers.ScalarMap[str, float]
    unchanged: bool
    loss_cause: LossCause
    noise_ratio: float
    def __init__(self, worker: _Optional[str] = ..., kind: _Optional[_Union[TaskKind, str]] = ..., phase: _Optional[_Union[TaskPhase, str]] = ..., reason: _Optional[str] = ..., example_count: _Optional[int] = ..., weight: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., timings: _Optional[_Union[_device_pb2.Timings, _Mapping]] = ..., download_bytes: _Optional[int] = ..., upload_bytes: _Optional[int] = ..., progress: _Optional[float] = ..., device_class: _Optional[str] = ..., peak_memory_bytes: _Optional[int] = ..., local_model: _Optional[_Union[LocalModel, _Mapping]] = ..., merged_updates: _Optional[int] = ..., steps: _Optional[int] = ..., staleness: _Optional[int] = ..., scale: _Optional[float] = ..., distance: _Optional[float] = ..., chosen: _Optional[str] = ..., prediction: _Optional[_Union[Prediction, _Mapping]] = ..., tensor_bytes: _Optional[int] = ..., download_recipe: _Optional[str] = ..., upload_recipe: _Optional[str] = ..., difference_recipe: _Optional[str] = ..., evaluation_metrics: _Optional[_Mapping[str, float]] = ..., unchanged: _Optional[bool] = ..., loss_cause: _Optional[_Union[LossCause, str]] = ..., noise_ratio: _Optional[float] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("download_seconds", "local_seconds", "upload_seconds", "peak_memory_bytes", "reason")
    DOWNLOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    download_seconds: float
    local_seconds: float
    upload_seconds: float
    peak_memory_bytes: int
    reason: str
    def __init__(self, download_seconds: _Optional[float] = ..., local_seconds: _Optional[float] = ..., upload_seconds: _Optional[float] = ..., peak_memory_bytes: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class WorkerHistory(_message.Message):
    __slots__ = ("timings", "selected_in", "loss", "example_count", "endings", "uplink_bytes_per_second", "downlink_bytes_per_second")
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    SELECTED_IN_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    ENDINGS_FIELD_NUMBER: _ClassVar[int]
    UPLINK_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DOWNLINK_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    timings: _containers.RepeatedCompositeFieldContainer[PastTiming]
    selected_in: int
    loss: float
    example_count: int
    endings: _containers.RepeatedScalarFieldContainer[LossCause]
    uplink_bytes_per_second: _containers.RepeatedScalarFieldContainer[float]
    downlink_bytes_per_second: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, timings: _Optional[_Iterable[_Union[PastTiming, _Mapping]]] = ..., selected_in: _Optional[int] = ..., loss: _Optional[float] = ..., example_count: _Optional[int] = ..., endings: _Optional[_Iterable[_Union[LossCause, str]]] = ..., uplink_bytes_per_second: _Optional[_Iterable[float]] = ..., downlink_bytes_per_second: _Optional[_Iterable[float]] = ...) -> None: ...

class PastTiming(_message.Message):
    __slots__ = ("download_seconds", "local_seconds", "upload_seconds", "cut")
    DOWNLOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    download_seconds: float
    local_seconds: float
    upload_seconds: float
    cut: bool
    def __init__(self, download_seconds: _Optional[float] = ..., local_seconds: _Optional[float] = ..., upload_seconds: _Optional[float] = ..., cut: _Optional[bool] = ...) -> None: ...

class Round(_message.Message):
    __slots__ = ("number", "phase", "base_version", "committed_version", "reason", "tasks", "started_at", "time_left", "duration_seconds", "metrics", "evaluator_metrics", "training_metrics", "kind", "deadline", "deadline_reason", "tasks_left_out", "accepted_left_out", "jump", "rolled_back_to", "dominance", "reconnect_grace", "metrics_of_sub_models", "scores_not_finite")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class EvaluatorMetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class TrainingMetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_FIELD_NUMBER: _ClassVar[int]
    DURATION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    EVALUATOR_METRICS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_METRICS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_REASON_FIELD_NUMBER: _ClassVar[int]
    TASKS_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    JUMP_FIELD_NUMBER: _ClassVar[int]
    ROLLED_BACK_TO_FIELD_NUMBER: _ClassVar[int]
    DOMINANCE_FIELD_NUMBER: _ClassVar[int]
    RECONNECT_GRACE_FIELD_NUMBER: _ClassVar[int]
    METRICS_OF_SUB_MODELS_FIELD_NUMBER: _ClassVar[int]
    SCORES_NOT_FINITE_FIELD_NUMBER: _ClassVar[int]
    number: int
    phase: RoundPhase
    base_version: int
    committed_version: int
    reason: str
    tasks: _containers.RepeatedCompositeFieldContainer[TaskRecord]
    started_at: _timestamp_pb2.Timestamp
    time_left: _duration_pb2.Duration
    duration_seconds: float
    metrics: _containers.ScalarMap[str, float]
    evaluator_metrics: _containers.ScalarMap[str, float]
    training_metrics: _containers.ScalarMap[str, float]
    kind: TaskKind
    deadline: _duration_pb2.Duration
    deadline_reason: str
    tasks_left_out: int
    accepted_left_out: int
    jump: Jump
    rolled_back_to: int
    dominance: Dominance
    reconnect_grace: _duration_pb2.Duration
    metrics_of_sub_models: bool
    scores_not_finite: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, number: _Optional[int] = ..., phase: _Optional[_Union[RoundPhase, str]] = ..., base_version: _Optional[int] = ..., committed_version: _Optional[int] = ..., reason: _Optional[str] = ..., tasks: _Optional[_Iterable[_Union[TaskRecord, _Mapping]]] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., time_left: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., duration_seconds: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., evaluator_metrics: _Optional[_Mapping[str, float]] = ..., training_metrics: _Optional[_Mapping[str, float]] = ..., kind: _Optional[_Union[TaskKind, str]] = ..., deadline: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., deadline_reason: _Optional[str] = ..., tasks_left_out: _Optional[int] = ..., accepted_left_out: _Optional[int] = ..., jump: _Optional[_Union[Jump, str]] = ..., rolled_back_to: _Optional[int] = ..., dominance: _Optional[_Union[Dominance, _Mapping]] = ..., reconnect_grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., metrics_of_sub_models: _Optional[bool] = ..., scores_not_finite: _Optional[_Iterable[str]] = ...) -> None: ...

class ModelVersion(_message.Message):
    __slots__ = ("version", "round", "sha256", "trained_rounds", "norm", "jump", "rolled_back_to", "first_model_sha256", "metrics", "evaluator_metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class EvaluatorMetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    TRAINED_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    JUMP_FIELD_NUMBER: _ClassVar[int]
    ROLLED_BACK_TO_FIELD_NUMBER: _ClassVar[int]
    FIRST_MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    EVALUATOR_METRICS_FIELD_NUMBER: _ClassVar[int]
    version: int
    round: int
    sha256: bytes
    trained_rounds: int
    norm: float
    jump: Jump
    rolled_back_to: int
    first_model_sha256: bytes
    metrics: _containers.ScalarMap[str, float]
    evaluator_metrics: _containers.ScalarMap[str, float]
    def __init__(self, version: _Optional[int] = ..., round: _Optional[int] = ..., sha256: _Optional[bytes] = ..., trained_rounds: _Optional[int] = ..., norm: _Optional[float] = ..., jump: _Optional[_Union[Jump, str]] = ..., rolled_back_to: _Optional[int] = ..., first_model_sha256: _Optional[bytes] = ..., metrics: _Optional[_Mapping[str, float]] = ..., evaluator_metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Dominance(_message.Message):
    __slots__ = ("worker", "share")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    share: float
    def __init__(self, worker: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...
