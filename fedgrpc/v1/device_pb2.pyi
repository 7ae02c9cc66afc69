from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_TRAINER: _ClassVar[WorkerRole]
    WORKER_ROLE_EVALUATOR: _ClassVar[WorkerRole]
    WORKER_ROLE_AGGREGATOR: _ClassVar[WorkerRole]

class NetworkKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NETWORK_KIND_UNSPECIFIED: _ClassVar[NetworkKind]
    NETWORK_KIND_ETHERNET: _ClassVar[NetworkKind]
    NETWORK_KIND_WIFI: _ClassVar[NetworkKind]
    NETWORK_KIND_CELLULAR: _ClassVar[NetworkKind]
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_TRAINER: WorkerRole
WORKER_ROLE_EVALUATOR: WorkerRole
WORKER_ROLE_AGGREGATOR: WorkerRole
NETWORK_KIND_UNSPECIFIED: NetworkKind
NETWORK_KIND_ETHERNET: NetworkKind
NETWORK_KIND_WIFI: NetworkKind
NETWORK_KIND_CELLULAR: NetworkKind

class DeviceProfile(_message.Message):
    __slots__ = ("device_class", "cpu_model", "cpu_cores", "memory_bytes", "accelerator", "accelerator_name", "accelerator_memory_bytes", "uplink_bits_per_second", "downlink_bits_per_second", "on_battery", "software_version", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DEVICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    CPU_MODEL_FIELD_NUMBER: _ClassVar[int]
    CPU_CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_NAME_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPLINK_BITS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DOWNLINK_BITS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    ON_BATTERY_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    device_class: str
    cpu_model: str
    cpu_cores: int
    memory_bytes: int
    accelerator: str
    accelerator_name: str
    accelerator_memory_bytes: int
    uplink_bits_per_second: int
    downlink_bits_per_second: int
    on_battery: bool
    software_version: str
    labels: _containers.ScalarMap[str, str]
    def __init__(self, device_class: _Optional[str] = ..., cpu_model: _Optional[str] = ..., cpu_cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., accelerator: _Optional[str] = ..., accelerator_name: _Optional[str] = ..., accelerator_memory_bytes: _Optional[int] = ..., uplink_bits_per_second: _Optional[int] = ..., downlink_bits_per_second: _Optional[int] = ..., on_battery: _Optional[bool] = ..., software_version: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class DeviceConditions(_message.Message):
    __slots__ = ("on_mains", "battery", "network", "temperature_celsius", "load", "local_minute")
    ON_MAINS_FIELD_NUMBER: _ClassVar[int]
    BATTERY_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_CELSIUS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LOCAL_MINUTE_FIELD_NUMBER: _ClassVar[int]
    on_mains: bool
    battery: float
    network: NetworkKind
    temperature_celsius: float
    load: float
    local_minute: int
    def __init__(self, on_mains: _Optional[bool] = ..., battery: _Optional[float] = ..., network: _Optional[_Union[NetworkKind, str]] = ..., temperature_celsius: _Optional[float] = ..., load: _Optional[float] = ..., local_minute: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("download_seconds", "local_seconds", "upload_seconds", "global_seconds")
    DOWNLOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    download_seconds: float
    local_seconds: float
    upload_seconds: float
    global_seconds: float
    def __init__(self, download_seconds: _Optional[float] = ..., local_seconds: _Optional[float] = ..., upload_seconds: _Optional[float] = ..., global_seconds: _Optional[float] = ...) -> None: ...
