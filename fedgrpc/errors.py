"""The one tree of errors.

An error is raised where it is known, says in one line what is wrong and what to do, and becomes a gRPC
status in one place, `fedgrpc.rpc.status`. The class alone decides the status, and whether a retry may help.

    FedgrpcError
    ├── UsageError                 a setting, flag or file the person gave        exit code 2
    │   ├── ExtraMissing           packages that a feature needs are not installed
    │   └── TaskUnfit              a learning task that can never take part
    ├── CodecError
    │   ├── EncodeError            the values cannot be encoded (non-finite, dtype)
    │   ├── LayoutError            manifest, tensors or sizes do not fit          INVALID_ARGUMENT
    │   ├── TooLargeError          a declared size is over the limit              RESOURCE_EXHAUSTED
    │   └── CorruptError           CRC, digest or frame does not match            DATA_LOSS
    ├── UpdateRefused              admission said no; carries the reason          INVALID_ARGUMENT
    │   ├── UnusableUpdate         an accepted update that cannot be averaged; carries its token
    │   └── NotFinite              what updates make of a tensor is not finite; carries its name
    ├── UnknownTask                no live lease under this token                 NOT_FOUND
    ├── UnknownWorker              the worker has not registered                  NOT_FOUND
    ├── NotFound                   no such run, round or model version            NOT_FOUND
    ├── RoundClosed                the round no longer takes updates              FAILED_PRECONDITION
    ├── IllegalTransition          an event the state does not allow              FAILED_PRECONDITION
    ├── WrongOffset                not the byte the receiver expects              OUT_OF_RANGE
    ├── Exhausted                  a bound is reached; try again later            RESOURCE_EXHAUSTED
    ├── WrongIdentity              the token belongs to another worker            PERMISSION_DENIED
    ├── NotApproved                an operator has yet to approve this device     PERMISSION_DENIED
    ├── NotEnrolled                no certificate that counts here                UNAUTHENTICATED
    │   └── CertificateStale       a certificate that has to be renewed           UNAUTHENTICATED
    ├── TokenRefused               a join token that opens nothing                UNAUTHENTICATED
    ├── NameTaken                  another device works under this name            ALREADY_EXISTS
    │   └── StateCopied            another process with the same state folder does ALREADY_EXISTS
    ├── StorageError               disk full, read-only or corrupt data folder    INTERNAL
    ├── LinkError                  the aggregator cannot be reached               UNAVAILABLE
    └── TaskError                  the user's own training code raised
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Self


class FedgrpcError(Exception):
    """Base of everything fedgrpc raises on purpose.

    `retryable`: whether the same call may succeed later, since a link, a restart, a bound or a disk made it fail.
    Each class declares it for itself and does not inherit it. The base stands for an error of a peer that this
    version does not know, and is retried.
    """

    retryable: ClassVar[bool] = True

    def __init_subclass__(cls, *, retryable: bool = False) -> None:
        super().__init_subclass__()
        cls.retryable = retryable


class UsageError(FedgrpcError):
    """A setting, flag or file given by a person is wrong."""


class ExtraMissing(UsageError):
    """Packages that a feature needs are not installed: its message names the extra that has them."""

    @classmethod
    def of(cls, feature: str, extra: str, cause: ImportError | None = None) -> Self:
        """Return the error for `feature`, whose packages `fedgrpc[extra]` has; `cause`: what is missing."""
        because = f" ({cause})" if cause else ""
        return cls(f"{feature} needs packages: pip install 'fedgrpc[{extra}]', in a clone '.[{extra}]'{because}")


class TaskUnfit(UsageError):
    """The learning task can never take part in this run. Its worker ends, since no other round would differ."""


class CodecError(FedgrpcError):
    """A payload cannot be encoded or decoded."""


class EncodeError(CodecError):
    """The values cannot be encoded: non-finite, or a dtype without an encoding."""


class LayoutError(CodecError):
    """The manifest, its tensors or its sizes do not fit each other or the model."""


class TooLargeError(CodecError):
    """A declared size is over the limit; raised before any memory is taken."""


class CorruptError(CodecError):
    """A CRC, digest or compressed frame does not match its content."""


class UpdateRefused(FedgrpcError):
    """Admission refused an update; the message is the reason."""


class UnusableUpdate(UpdateRefused):
    """An accepted update cannot be averaged; `token` is its lease."""

    def __init__(self, *args: object, token: str = "") -> None:
        super().__init__(*args)
        self.token = token


class NotFinite(UpdateRefused):
    """The updates of a round make a tensor that is not finite; `tensor` is its name."""

    def __init__(self, *args: object, tensor: str = "") -> None:
        super().__init__(*args)
        self.tensor = tensor


class UnknownTask(FedgrpcError):
    """No live lease is held under this token."""


class UnknownWorker(FedgrpcError, retryable=True):
    """The worker has not registered with this aggregator."""


class NotFound(FedgrpcError):
    """No such run, round or model version."""


class RoundClosed(FedgrpcError):
    """The round no longer takes updates."""


class IllegalTransition(FedgrpcError):
    """An event that the present state does not allow; nothing has happened."""


class WrongOffset(FedgrpcError):
    """The data does not start at the byte the receiver expects."""


class Exhausted(FedgrpcError, retryable=True):
    """A bound (uploads, workers, memory, disk) is reached; trying again later may succeed.

    `retry_after_s` is when it is likely to succeed, in seconds; None: unknown.
    """

    def __init__(self, *args: object, retry_after_s: float | None = None) -> None:
        super().__init__(*args)
        self.retry_after_s = retry_after_s


class WrongIdentity(FedgrpcError):
    """The task token or the name belongs to another worker, or the caller may not do this."""


class NotApproved(FedgrpcError, retryable=True):
    """An operator has yet to approve this device."""


class NotEnrolled(FedgrpcError):
    """The caller shows no certificate that counts here."""


class CertificateStale(NotEnrolled, retryable=True):
    """The caller's certificate is past its life; renew it."""


class TokenRefused(FedgrpcError):
    """A join token is wrong, expired, used up, or another aggregator's."""


class NameTaken(FedgrpcError, retryable=True):
    """Another device works under this worker's name, and is alive."""


class StateCopied(NameTaken):
    """Another process with a copy of this worker's state folder works under its name."""


class StorageError(FedgrpcError, retryable=True):
    """The data folder is full, read-only or corrupt."""


class LinkError(FedgrpcError, retryable=True):
    """The other side cannot be reached."""


class TaskError(FedgrpcError):
    """The user's own training code raised; the message names the exception."""


@contextmanager
def blaming(token: str) -> Iterator[None]:
    """Raise an error in the block as an `UnusableUpdate` of this token, which a round can leave out.

    Whatever uses the data of one update runs in such a block, so that the others still count. Errors of the disk
    and of the process itself are raised as they are: no update is to blame.
    """
    try:
        yield
    except (UnusableUpdate, StorageError, NotFound, OSError, MemoryError):
        raise
    except Exception as error:
        # An error that nobody raised on purpose says its class, too.
        reason = str(error) if isinstance(error, FedgrpcError) else f"{type(error).__name__}: {error}"
        raise UnusableUpdate(reason, token=token) from error
