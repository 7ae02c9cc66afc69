from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_TRAINER: _ClassVar[WorkerRole]
    WORKER_ROLE_EVALUATOR: _ClassVar[WorkerRole]
    WORKER_ROLE_AGGREGATOR: _ClassVar[WorkerRole]
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_TRAINER: WorkerRole
WORKER_ROLE_EVALUATOR: WorkerRole
WORKER_ROLE_AGGREGATOR: WorkerRole

class DeviceProfile(_message.Message):
    __slots__ = ("device_class", "cpu_model", "cpu_cores", "memory_bytes", "accelerator", "accelerator_name", "accelerator_memory_bytes", "uplink_bits_per_second", "downlink_bits_per_second", "on_battery", "software_version")
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
    def __init__(self, device_class: _Optional[str] = ..., cpu_model: _Optional[str] = ..., cpu_cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., accelerator: _Optional[str] = ..., accelerator_name: _Optional[str] = ..., accelerator_memory_bytes: _Optional[int] = ..., uplink_bits_per_second: _Optional[int] = ..., downlink_bits_per_second: _Optional[int] = ..., on_battery: _Optional[bool] = ..., software_version: _Optional[str] = ...) -> None: ...

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
