"""Releases with noise, and what a device is asked to bound, as messages."""

from __future__ import annotations

from fedgrpc.errors import LayoutError
from fedgrpc.privacy.ledger import Ledger, PrivateRelease, ReleaseRules
from fedgrpc.v1 import privacy_pb2

_MECHANISMS = {
    "gaussian": privacy_pb2.PRIVACY_MECHANISM_GAUSSIAN,
    "dp-ftrl": privacy_pb2.PRIVACY_MECHANISM_DP_FTRL,
    "dp-mf": privacy_pb2.PRIVACY_MECHANISM_DP_MF,
}


def release_to_proto(release: PrivateRelease) -> privacy_pb2.PrivateRelease:
    """Return the message of a release."""
    return privacy_pb2.PrivateRelease(
        step=release.step,
        round=release.round,
        version=release.version,
        count=release.count,
        updates=release.updates,
        rules=rules_to_proto(release.rules),
        next_clip_norm=release.next_clip_norm,
    )


def release_from_proto(message: privacy_pb2.PrivateRelease) -> PrivateRelease:
    """Return a release. Raises `LayoutError` for a mechanism that is not known."""
    rules = rules_from_proto(message.rules)
    about = message.step, message.round, message.version, message.count, message.updates
    return PrivateRelease(*about, rules, message.next_clip_norm)


def rules_to_proto(rules: ReleaseRules) -> privacy_pb2.ReleaseRules:
    """Return the message of the rules of a release."""
    return privacy_pb2.ReleaseRules(
        mechanism=privacy_pb2.PrivacyMechanism.Name(_MECHANISMS[rules.mechanism]),
        noise_multiplier=rules.noise_multiplier,
        clip_norm=rules.clip_norm,
        cohort=rules.cohort,
        min_separation=rules.min_separation,
        rate=rules.rate,
        clip_quantile=rules.clip_quantile,
        bands=rules.bands,
    )


def rules_from_proto(message: privacy_pb2.ReleaseRules) -> ReleaseRules:
    """Return the rules of a release. Raises `LayoutError` for a mechanism that is not known."""
    for mechanism, number in _MECHANISMS.items():
        if number == message.mechanism:
            return ReleaseRules(
                mechanism,  # type: ignore[arg-type]
                message.noise_multiplier,
                message.clip_norm,
                message.cohort,
                message.min_separation,
                message.rate if message.HasField("rate") else None,
                message.clip_quantile if message.HasField("clip_quantile") else None,
                message.bands,
            )
    raise LayoutError(f"unknown privacy mechanism {message.mechanism}")


def ledger_to_proto(ledger: Ledger, planned: int) -> privacy_pb2.PrivacyLedger:
    """Return the message of a ledger; `planned` more releases are to follow."""
    return privacy_pb2.PrivacyLedger(
        rules=rules_to_proto(ledger.rules),
        delta=ledger.delta,
        target_epsilon=ledger.target_epsilon,
        planned=planned,
        releases=map(release_to_proto, ledger.releases),
    )


def ledger_from_proto(message: privacy_pb2.PrivacyLedger) -> Ledger:
    """Return a ledger, without the devices of its releases. Raises `LayoutError`."""
    return Ledger(
        rules_from_proto(message.rules),
        message.delta,
        message.target_epsilon if message.HasField("target_epsilon") else None,
        tuple(map(release_from_proto, message.releases)),
    )
