from fedgrpc.v1 import round_pb2 as _round_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrivacyMechanism(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIVACY_MECHANISM_UNSPECIFIED: _ClassVar[PrivacyMechanism]
    PRIVACY_MECHANISM_GAUSSIAN: _ClassVar[PrivacyMechanism]
    PRIVACY_MECHANISM_DP_FTRL: _ClassVar[PrivacyMechanism]
    PRIVACY_MECHANISM_DP_MF: _ClassVar[PrivacyMechanism]
PRIVACY_MECHANISM_UNSPECIFIED: PrivacyMechanism
PRIVACY_MECHANISM_GAUSSIAN: PrivacyMechanism
PRIVACY_MECHANISM_DP_FTRL: PrivacyMechanism
PRIVACY_MECHANISM_DP_MF: PrivacyMechanism

class ReleaseRules(_message.Message):
    __slots__ = ("mechanism", "noise_multiplier", "clip_norm", "cohort", "min_separation", "rate", "clip_quantile", "bands")
    MECHANISM_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    MIN_SEPARATION_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    CLIP_QUANTILE_FIELD_NUMBER: _ClassVar[int]
    BANDS_FIELD_NUMBER: _ClassVar[int]
    mechanism: PrivacyMechanism
    noise_multiplier: float
    clip_norm: float
    cohort: int
    min_separation: int
    rate: float
    clip_quantile: float
    bands: int
    def __init__(self, mechanism: _Optional[_Union[PrivacyMechanism, str]] = ..., noise_multiplier: _Optional[float] = ..., clip_norm: _Optional[float] = ..., cohort: _Optional[int] = ..., min_separation: _Optional[int] = ..., rate: _Optional[float] = ..., clip_quantile: _Optional[float] = ..., bands: _Optional[int] = ...) -> None: ...

class PrivateRelease(_message.Message):
    __slots__ = ("step", "round", "version", "count", "updates", "rules", "next_clip_norm")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    NEXT_CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    step: int
    round: int
    version: int
    count: int
    updates: bytes
    rules: ReleaseRules
    next_clip_norm: float
    def __init__(self, step: _Optional[int] = ..., round: _Optional[int] = ..., version: _Optional[int] = ..., count: _Optional[int] = ..., updates: _Optional[bytes] = ..., rules: _Optional[_Union[ReleaseRules, _Mapping]] = ..., next_clip_norm: _Optional[float] = ...) -> None: ...

class PrivacyLedger(_message.Message):
    __slots__ = ("rules", "delta", "target_epsilon", "planned", "releases")
    RULES_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    TARGET_EPSILON_FIELD_NUMBER: _ClassVar[int]
    PLANNED_FIELD_NUMBER: _ClassVar[int]
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    rules: ReleaseRules
    delta: float
    target_epsilon: float
    planned: int
    releases: _containers.RepeatedCompositeFieldContainer[PrivateRelease]
    def __init__(self, rules: _Optional[_Union[ReleaseRules, _Mapping]] = ..., delta: _Optional[float] = ..., target_epsilon: _Optional[float] = ..., planned: _Optional[int] = ..., releases: _Optional[_Iterable[_Union[PrivateRelease, _Mapping]]] = ...) -> None: ...

class UpdatePrivacy(_message.Message):
    __slots__ = ("clip_norm", "without_metrics")
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_METRICS_FIELD_NUMBER: _ClassVar[int]
    clip_norm: float
    without_metrics: bool
    def __init__(self, clip_norm: _Optional[float] = ..., without_metrics: _Optional[bool] = ...) -> None: ...

class OneTimeKeys(_message.Message):
    __slots__ = ("masking", "sealing", "seed_check", "signature")
    MASKING_FIELD_NUMBER: _ClassVar[int]
    SEALING_FIELD_NUMBER: _ClassVar[int]
    SEED_CHECK_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    masking: bytes
    sealing: bytes
    seed_check: bytes
    signature: KeySignature
    def __init__(self, masking: _Optional[bytes] = ..., sealing: _Optional[bytes] = ..., seed_check: _Optional[bytes] = ..., signature: _Optional[_Union[KeySignature, _Mapping]] = ...) -> None: ...

class KeySignature(_message.Message):
    __slots__ = ("signed_at", "value", "chain")
    SIGNED_AT_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    signed_at: int
    value: bytes
    chain: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, signed_at: _Optional[int] = ..., value: _Optional[bytes] = ..., chain: _Optional[_Iterable[bytes]] = ...) -> None: ...

class SecureNeighbour(_message.Message):
    __slots__ = ("worker", "point", "keys")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    point: int
    keys: OneTimeKeys
    def __init__(self, worker: _Optional[str] = ..., point: _Optional[int] = ..., keys: _Optional[_Union[OneTimeKeys, _Mapping]] = ...) -> None: ...

class SecureTensor(_message.Message):
    __slots__ = ("name", "shape", "bound")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    bound: float
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., bound: _Optional[float] = ...) -> None: ...

class CommonTerms(_message.Message):
    __slots__ = ("session", "run_id", "round", "model_version", "model_sha256", "plan", "evaluate", "privacy", "learning_task", "model", "options", "threshold", "bits", "weight_bits", "count", "most_examples", "tensors", "norm", "coordinates")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    LEARNING_TASK_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BITS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    MOST_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    COORDINATES_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    run_id: str
    round: int
    model_version: int
    model_sha256: bytes
    plan: _round_pb2.TrainingPlan
    evaluate: bool
    privacy: UpdatePrivacy
    learning_task: str
    model: str
    options: _containers.ScalarMap[str, str]
    threshold: int
    bits: int
    weight_bits: int
    count: int
    most_examples: int
    tensors: _containers.RepeatedCompositeFieldContainer[SecureTensor]
    norm: float
    coordinates: int
    def __init__(self, session: _Optional[bytes] = ..., run_id: _Optional[str] = ..., round: _Optional[int] = ..., model_version: _Optional[int] = ..., model_sha256: _Optional[bytes] = ..., plan: _Optional[_Union[_round_pb2.TrainingPlan, _Mapping]] = ..., evaluate: _Optional[bool] = ..., privacy: _Optional[_Union[UpdatePrivacy, _Mapping]] = ..., learning_task: _Optional[str] = ..., model: _Optional[str] = ..., options: _Optional[_Mapping[str, str]] = ..., threshold: _Optional[int] = ..., bits: _Optional[int] = ..., weight_bits: _Optional[int] = ..., count: _Optional[int] = ..., most_examples: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[SecureTensor, _Mapping]]] = ..., norm: _Optional[float] = ..., coordinates: _Optional[int] = ...) -> None: ...

class SecureTask(_message.Message):
    __slots__ = ("common", "keys", "point", "neighbours")
    COMMON_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    common: bytes
    keys: OneTimeKeys
    point: int
    neighbours: _containers.RepeatedCompositeFieldContainer[SecureNeighbour]
    def __init__(self, common: _Optional[bytes] = ..., keys: _Optional[_Union[OneTimeKeys, _Mapping]] = ..., point: _Optional[int] = ..., neighbours: _Optional[_Iterable[_Union[SecureNeighbour, _Mapping]]] = ...) -> None: ...

class SecureParts(_message.Message):
    __slots__ = ("parts",)
    class PartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    PARTS_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.ScalarMap[str, bytes]
    def __init__(self, parts: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class SecureQuestion(_message.Message):
    __slots__ = ("token", "run_id", "arrived")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_FIELD_NUMBER: _ClassVar[int]
    token: str
    run_id: str
    arrived: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, token: _Optional[str] = ..., run_id: _Optional[str] = ..., arrived: _Optional[_Iterable[str]] = ...) -> None: ...
