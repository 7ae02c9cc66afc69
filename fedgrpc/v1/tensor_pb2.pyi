from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_FLOAT64: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]
    DTYPE_FLOAT16: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]
    DTYPE_INT64: _ClassVar[Dtype]
    DTYPE_INT32: _ClassVar[Dtype]
    DTYPE_INT16: _ClassVar[Dtype]
    DTYPE_INT8: _ClassVar[Dtype]
    DTYPE_UINT8: _ClassVar[Dtype]
    DTYPE_BOOL: _ClassVar[Dtype]

class TensorRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TENSOR_ROLE_UNSPECIFIED: _ClassVar[TensorRole]
    TENSOR_ROLE_PARAMETER: _ClassVar[TensorRole]
    TENSOR_ROLE_STATISTIC: _ClassVar[TensorRole]
    TENSOR_ROLE_COUNTER: _ClassVar[TensorRole]
    TENSOR_ROLE_CONSTANT: _ClassVar[TensorRole]

class Compression(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPRESSION_UNSPECIFIED: _ClassVar[Compression]
    COMPRESSION_NONE: _ClassVar[Compression]
    COMPRESSION_ZSTD: _ClassVar[Compression]
DTYPE_UNSPECIFIED: Dtype
DTYPE_FLOAT64: Dtype
DTYPE_FLOAT32: Dtype
DTYPE_FLOAT16: Dtype
DTYPE_BFLOAT16: Dtype
DTYPE_INT64: Dtype
DTYPE_INT32: Dtype
DTYPE_INT16: Dtype
DTYPE_INT8: Dtype
DTYPE_UINT8: Dtype
DTYPE_BOOL: Dtype
TENSOR_ROLE_UNSPECIFIED: TensorRole
TENSOR_ROLE_PARAMETER: TensorRole
TENSOR_ROLE_STATISTIC: TensorRole
TENSOR_ROLE_COUNTER: TensorRole
TENSOR_ROLE_CONSTANT: TensorRole
COMPRESSION_UNSPECIFIED: Compression
COMPRESSION_NONE: Compression
COMPRESSION_ZSTD: Compression

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape", "role", "tied_names")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TIED_NAMES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: Dtype
    shape: _containers.RepeatedScalarFieldContainer[int]
    role: TensorRole
    tied_names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., shape: _Optional[_Iterable[int]] = ..., role: _Optional[_Union[TensorRole, str]] = ..., tied_names: _Optional[_Iterable[str]] = ...) -> None: ...

class ChannelGroup(_message.Message):
    __slots__ = ("channels", "blocks", "rank")
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    channels: int
    blocks: int
    rank: bool
    def __init__(self, channels: _Optional[int] = ..., blocks: _Optional[int] = ..., rank: _Optional[bool] = ...) -> None: ...

class ChannelSegment(_message.Message):
    __slots__ = ("group", "repeat")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    REPEAT_FIELD_NUMBER: _ClassVar[int]
    group: int
    repeat: int
    def __init__(self, group: _Optional[int] = ..., repeat: _Optional[int] = ...) -> None: ...

class ChannelAxis(_message.Message):
    __slots__ = ("segments",)
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    segments: _containers.RepeatedCompositeFieldContainer[ChannelSegment]
    def __init__(self, segments: _Optional[_Iterable[_Union[ChannelSegment, _Mapping]]] = ...) -> None: ...

class ChannelAxes(_message.Message):
    __slots__ = ("axes",)
    AXES_FIELD_NUMBER: _ClassVar[int]
    axes: _containers.RepeatedCompositeFieldContainer[ChannelAxis]
    def __init__(self, axes: _Optional[_Iterable[_Union[ChannelAxis, _Mapping]]] = ...) -> None: ...

class ChannelMap(_message.Message):
    __slots__ = ("groups", "tensors", "blocks", "costs")
    class TensorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: ChannelAxes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[ChannelAxes, _Mapping]] = ...) -> None: ...
    class BlocksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[ChannelGroup]
    tensors: _containers.MessageMap[str, ChannelAxes]
    blocks: _containers.ScalarMap[str, int]
    costs: _containers.RepeatedCompositeFieldContainer[LayerCost]
    def __init__(self, groups: _Optional[_Iterable[_Union[ChannelGroup, _Mapping]]] = ..., tensors: _Optional[_Mapping[str, ChannelAxes]] = ..., blocks: _Optional[_Mapping[str, int]] = ..., costs: _Optional[_Iterable[_Union[LayerCost, _Mapping]]] = ...) -> None: ...

class LayerCost(_message.Message):
    __slots__ = ("name", "work", "kept_bytes", "input_bytes", "shared_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    KEPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    INPUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    work: float
    kept_bytes: float
    input_bytes: float
    shared_bytes: float
    def __init__(self, name: _Optional[str] = ..., work: _Optional[float] = ..., kept_bytes: _Optional[float] = ..., input_bytes: _Optional[float] = ..., shared_bytes: _Optional[float] = ...) -> None: ...

class Encoding(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: str
    def __init__(self, spec: _Optional[str] = ...) -> None: ...

class TensorEntry(_message.Message):
    __slots__ = ("tensor", "encoding", "size_bytes")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    tensor: TensorSpec
    encoding: Encoding
    size_bytes: int
    def __init__(self, tensor: _Optional[_Union[TensorSpec, _Mapping]] = ..., encoding: _Optional[_Union[Encoding, _Mapping]] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("size_bytes", "content_size_bytes")
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONTENT_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    size_bytes: int
    content_size_bytes: int
    def __init__(self, size_bytes: _Optional[int] = ..., content_size_bytes: _Optional[int] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("entries", "compression", "frames", "size_bytes", "digest")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[TensorEntry]
    compression: Compression
    frames: _containers.RepeatedCompositeFieldContainer[Frame]
    size_bytes: int
    digest: bytes
    def __init__(self, entries: _Optional[_Iterable[_Union[TensorEntry, _Mapping]]] = ..., compression: _Optional[_Union[Compression, str]] = ..., frames: _Optional[_Iterable[_Union[Frame, _Mapping]]] = ..., size_bytes: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "data", "crc32")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    crc32: int
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...
