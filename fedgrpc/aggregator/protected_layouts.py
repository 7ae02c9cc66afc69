"""Layouts of models that noise or secure sums protect whole. Pure.

The rule: a tensor that is neither trained nor constant would leave a device as it is. A model with one is refused
before anything is sent.
"""

from __future__ import annotations

from fedgrpc.codec.layout import Layout, TensorRole, TensorSpec

_ADVICE = "a model without such tensors, as with GroupNorm in place of BatchNorm"


def complaint(layout: Layout, *, private: bool, secure: bool) -> str:
    """Return why a run with differential privacy (`private`) or secure sums cannot have this model; "": it can."""
    spec = _unprotected(layout)
    if private and spec is not None:
        return f"{_named(spec)} would be released without noise: privacy needs {_ADVICE}"
    if secure and layout and not any(spec.is_trained for spec in layout):
        return "secure_aggregation needs a model with trained tensors"
    if secure and spec is not None:
        return f"{_named(spec)} no secure sum can add: secure_aggregation needs {_ADVICE}"
    return ""


def _unprotected(layout: Layout) -> TensorSpec | None:
    """Return the first tensor that neither noise nor masks cover; None: there is none."""
    return next((spec for spec in layout if not spec.is_trained and spec.role is not TensorRole.CONSTANT), None)


def _named(spec: TensorSpec) -> str:
    return f"tensor {spec.name!r} is a {spec.role}, which"
