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
PRIVACY_MECHANISM_UNSPECIFIED: PrivacyMechanism
PRIVACY_MECHANISM_GAUSSIAN: PrivacyMechanism
PRIVACY_MECHANISM_DP_FTRL: PrivacyMechanism

class ReleaseRules(_message.Message):
    __slots__ = ("mechanism", "noise_multiplier", "clip_norm", "cohort", "min_separation", "rate")
    MECHANISM_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    MIN_SEPARATION_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    mechanism: PrivacyMechanism
    noise_multiplier: float
    clip_norm: float
    cohort: int
    min_separation: int
    rate: float
    def __init__(self, mechanism: _Optional[_Union[PrivacyMechanism, str]] = ..., noise_multiplier: _Optional[float] = ..., clip_norm: _Optional[float] = ..., cohort: _Optional[int] = ..., min_separation: _Optional[int] = ..., rate: _Optional[float] = ...) -> None: ...

class PrivateRelease(_message.Message):
    __slots__ = ("step", "round", "version", "count", "updates", "rules")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    step: int
    round: int
    version: int
    count: int
    updates: bytes
    rules: ReleaseRules
    def __init__(self, step: _Optional[int] = ..., round: _Optional[int] = ..., version: _Optional[int] = ..., count: _Optional[int] = ..., updates: _Optional[bytes] = ..., rules: _Optional[_Union[ReleaseRules, _Mapping]] = ...) -> None: ...

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
