"""Errors say themselves whether the same call may succeed later."""

from fedgrpc import errors
from fedgrpc.errors import FedgrpcError


def test_what_a_link_a_restart_a_bound_or_a_disk_made_fail_is_retryable_and_nothing_else():
    classes = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, FedgrpcError)]
    retryable = {item.__name__ for item in classes if item.retryable}
    known = {
        "LinkError",
        "UnknownWorker",
        "Exhausted",
        "StorageError",
        "NameTaken",
        "NotApproved",
        "CertificateStale",
    }
    assert retryable == {"FedgrpcError", *known}


def test_a_subclass_does_not_inherit_that_it_is_retryable():
    class Other(errors.LinkError):
        pass

    assert errors.LinkError.retryable
    assert not Other.retryable
