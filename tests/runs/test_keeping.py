"""Names of versions, versions that are kept, and patience."""

import pytest

from fedgrpc.errors import NotFound, UsageError
from fedgrpc.rounds.version import Version
from fedgrpc.runs.keeping import Reference, checked_tag, kept, out_of_patience, resolve
from fedgrpc.runs.versions import Versions


def versions_with(*accuracies, first=1):
    versions = Versions()
    for number, accuracy in enumerate(accuracies, first):
        metrics = {} if accuracy is None else {"accuracy": accuracy}
        versions.add(Version(number, number, b"digest", metrics=metrics))
    return versions


@pytest.mark.parametrize(
    ("text", "run", "name"),
    [("", "", "latest"), ("cars", "cars", "latest"), ("cars@best", "cars", "best"), ("@17", "", "17")],
)
def test_a_version_is_named_by_run_and_name(text, run, name):
    assert Reference.parse(text) == Reference(run, name)


def test_a_reference_that_ends_with_its_mark_names_no_version():
    with pytest.raises(UsageError, match="names no version"):
        Reference.parse("cars@")


def test_a_version_is_found_by_number_word_and_tag():
    versions, tags = versions_with(0.5, 0.9, 0.7), {"v1.0": 1}
    found = [resolve(name, versions, tags, ended=True) for name in ("", "latest", "final", "best", "2", "v1.0")]
    assert found == [3, 3, 3, 2, 2, 1]


@pytest.mark.parametrize("name", ["4", "0", "v2.0", "9" * 30, "final"])
def test_a_version_that_is_not_there_is_not_found(name):
    with pytest.raises(NotFound):
        resolve(name, versions_with(0.5), {"v1.0": 1}, ended=False)


def test_a_version_without_a_model_is_none():
    versions = versions_with(0.5)
    versions.add(Version(2, 0, b""))
    with pytest.raises(NotFound):
        resolve("latest", versions, {}, ended=False)


@pytest.mark.parametrize("name", ["best", "latest", "final", "17", "-x", "", "a b", "x" * 65, "a@b"])
def test_a_tag_means_nothing_else(name):
    with pytest.raises(UsageError, match="a tag begins"):
        checked_tag(name)


def test_the_last_are_kept_with_all_that_a_task_trains_from_and_the_named():
    assert kept(10, 3, 10, {4, 0}) == (frozenset({8, 9, 10}), frozenset({4}))
    assert kept(10, 3, 6, {4}) == (frozenset({6, 7, 8, 9, 10}), frozenset({4}))


def test_patience_ends_when_none_of_the_last_versions_was_better():
    assert out_of_patience(versions_with(0.9, 0.8, 0.7), 2)
    assert not out_of_patience(versions_with(0.9, 0.8, 0.95), 2)
    assert not out_of_patience(versions_with(0.9, 0.8, 0.7), None)


def test_patience_counts_versions_that_were_scored_also_if_they_are_kept_no_more():
    versions = versions_with(0.9, 0.8, None)
    assert not out_of_patience(versions, 2)
    versions.add(Version(9, 9, b"digest", metrics={"accuracy": 0.1}))
    versions.keep_only({1, 9})
    assert out_of_patience(versions, 8)
    assert not out_of_patience(versions, 9)


def test_patience_waits_for_the_first_score():
    assert not out_of_patience(versions_with(None, None, None), 1)
