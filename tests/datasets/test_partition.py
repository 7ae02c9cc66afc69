"""Parts are disjoint, complete, seeded and never too small, whatever the labels are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.datasets.dataset import Examples, LabelledData
from fedgrpc.datasets.partition import (
    MINIMUM_PART_SIZE,
    ByGroup,
    FeatureNoise,
    Partition,
    parse_part,
    parse_partition,
)
from fedgrpc.datasets.shares import take_share
from fedgrpc.errors import UsageError

KINDS = [
    "iid",
    "dirichlet:0.5",
    "dirichlet:0.01",
    "dirichlet:100",
    "shards:2",
    "labels:2",
    "quantity:0.5",
    "quantity:0.05",
    "noise:0.1",
]
LABELS = np.repeat(np.arange(10), 600)


def label_share(labels: np.ndarray, part: np.ndarray) -> np.ndarray:
    return np.bincount(labels[part], minlength=10) / len(part)


@given(
    st.sampled_from(KINDS),
    st.integers(1, 12),
    st.lists(st.integers(0, 4), min_size=24, max_size=300),
    st.integers(0, 2**31),
)
def test_parts_are_disjoint_and_together_everything(kind: str, parts: int, labels: list[int], seed: int) -> None:
    split = parse_partition(kind).split(np.array(labels), parts, seed)
    assert len(split) == parts
    assert sorted(np.concatenate(split).tolist()) == list(range(len(labels)))


@given(st.sampled_from(KINDS), st.integers(1, 12), st.integers(24, 300), st.integers(0, 2**31))
def test_no_part_is_smaller_than_the_minimum_or_an_even_share(
    kind: str, parts: int, count: int, seed: int
) -> None:
    split = parse_partition(kind).split(np.arange(count) % 7, parts, seed)
    assert min(map(len, split)) >= min(MINIMUM_PART_SIZE, count // parts) - (kind == "shards:2")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_parts_and_another_seed_others(kind: str) -> None:
    split = parse_partition(kind).split
    first, again, other = split(LABELS, 5, 3), split(LABELS, 5, 3), split(LABELS, 5, 4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", ["iid", "dirichlet:0.5", "shards:2", "labels:3", "quantity:0.5"])
def test_training_and_held_out_set_give_a_part_the_same_mix_and_share(kind: str) -> None:
    partition, held_out = parse_partition(kind), np.tile(np.arange(10), 200)
    train_parts, held_out_parts = partition.split(LABELS, 5, 1), partition.split(held_out, 5, 1)
    for train, test in zip(train_parts, held_out_parts, strict=True):
        if len(test) > 100:
            assert np.abs(label_share(LABELS, train) - label_share(held_out, test)).max() < 0.1
        assert abs(len(train) / len(LABELS) - len(test) / len(held_out)) < 0.01


def test_parts_of_an_iid_partition_differ_by_at_most_one_example() -> None:
    sizes = [len(part) for part in parse_partition("iid").split(np.zeros(103, int), 10, 0)]
    assert max(sizes) - min(sizes) == 1


def test_a_small_alpha_skews_the_labels_and_a_large_one_does_not() -> None:
    def largest_share(kind: str) -> float:
        parts = parse_partition(kind).split(LABELS, 10, 0)
        return float(np.mean([label_share(LABELS, part).max() for part in parts]))

    assert largest_share("dirichlet:0.05") > 0.6
    assert largest_share("dirichlet:1000") < 0.15


def test_dirichlet_parts_that_are_full_get_no_further_labels() -> None:
    """NIID-Bench: a part is passed over once it holds N / parts; so none exceeds that by more than one label."""
    for seed in range(20):
        sizes = [len(part) for part in parse_partition("dirichlet:0.1").split(LABELS, 10, seed)]
        assert max(sizes) <= len(LABELS) // 10 + 600 + MINIMUM_PART_SIZE


def test_two_shards_hold_about_two_labels() -> None:
    parts = parse_partition("shards:2").split(LABELS, 10, 0)
    assert max(len(np.unique(LABELS[part])) for part in parts) <= 4
    assert {len(part) for part in parts} == {600}


@given(st.integers(2, 8), st.integers(1, 9), st.integers(0, 12), st.data())
def test_each_part_has_k_labels_and_each_label_is_divided_evenly_among_its_owners(
    classes: int, k: int, more_parts: int, data: st.DataObject
) -> None:
    """NIID-Bench's #C=k, for at least as many parts as labels."""
    parts, k = classes + more_parts, min(k, classes)
    counts = [
        data.draw(st.integers(MINIMUM_PART_SIZE * parts, MINIMUM_PART_SIZE * parts + 50)) for _ in range(classes)
    ]
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), counts))
    split = parse_partition(f"labels:{k}").split(labels, parts, data.draw(st.integers(0, 2**32 - 1)))
    held = np.array([np.bincount(labels[part], minlength=classes) for part in split])
    assert (np.count_nonzero(held, axis=1) == k).all()
    assert all(held[part, part % classes] for part in range(parts))
    for label in range(classes):
        owned = held[held[:, label] > 0, label]
        assert owned.max() - owned.min() <= 1


def test_labels_that_fewer_parts_did_not_draw_are_not_left_out() -> None:
    parts = parse_partition("labels:2").split(LABELS, 3, 0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(LABELS)))


def test_quantity_skew_changes_sizes_and_not_labels() -> None:
    parts = parse_partition("quantity:0.5").split(LABELS, 5, 0)
    assert max(map(len, parts)) > 3 * min(map(len, parts))
    largest = max(parts, key=len)
    assert label_share(LABELS, largest).max() < 0.15


@pytest.mark.parametrize(
    "text",
    ["", "IID", "iid:2", "dirichlet", "dirichlet:", "dirichlet:0", "dirichlet:-1", "dirichlet:nan", "shards:1.5",
     "shards:0", "labels:", "labels:0", "quantity:inf", "other:1"],
)  # fmt: skip
def test_a_partition_that_is_none_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"^[^\n]*partition[^\n]*$"):
        parse_partition(text)


def test_a_part_counts_from_one() -> None:
    assert parse_part("3/10") == (2, 10)
    assert parse_part("1/1") == (0, 1)


@pytest.mark.parametrize("text", ["", "3", "0/10", "11/10", "-1/10", "a/b", "1/0", "1/2/3"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must look like 3/10"):
        parse_part(text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [4, 0])
def test_what_cannot_be_shared_out_is_refused(kind: str, parts: int) -> None:
    partition: Partition = parse_partition(kind)
    with pytest.raises(UsageError):
        partition.split(np.zeros(3, int), parts, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_partition_by_label_needs_one_label_of_each_example(kind: str) -> None:
    partition: Partition = parse_partition(kind)
    targets = np.zeros((40, 2), int)
    if partition.by_label:
        with pytest.raises(UsageError, match="one label per example"):
            partition.split(targets, 2, 0)
    else:
        assert sum(map(len, partition.split(targets, 2, 0))) == 40


def test_feature_noise_grows_from_part_to_part_and_spares_the_first() -> None:
    """NIID-Bench: part i of n has the deviation level * i / (n - 1)."""
    noise = FeatureNoise(0.2)
    clean = np.full((50, 400), 0.5)
    deviations = [float((noise.noisy(clean, index, 5, 0) - clean).std()) for index in range(5)]
    assert deviations[0] == 0
    assert deviations == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2], rel=0.03)


def test_feature_noise_keeps_pixels_whole_and_in_their_range() -> None:
    pixels = np.array([[0, 128, 255]] * 5000, np.uint8)
    noisy = FeatureNoise(0.1).noisy(pixels, 4, 5, 0)
    assert noisy.dtype == np.uint8
    assert abs(float(noisy[:, 1].astype(float).std()) - 25.5) < 1
    assert noisy[:, 0].min() == 0
    assert noisy[:, 2].max() == 255


@given(st.integers(1, 12), st.lists(st.integers(0, 30), min_size=60, max_size=200), st.integers(0, 2**31))
def test_by_group_no_group_is_torn_apart(parts: int, groups: list[int], seed: int) -> None:
    of_example = np.array(groups)
    split = ByGroup().split(of_example, min(parts, len(set(groups))), seed)
    owners = [set(of_example[part]) for part in split]
    assert sorted(np.concatenate(split).tolist()) == list(range(len(groups)))
    assert sum(map(len, owners)) == len(set(groups))
    assert max(map(len, owners)) - min(map(len, owners)) <= 1


def test_a_partition_by_groups_wants_to_know_them() -> None:
    plain = Examples(np.zeros((4, 1)), np.zeros(4, np.int64))
    with pytest.raises(UsageError, match="belong together"):
        take_share(LabelledData(plain, plain), ByGroup(), 0, 2, 0)
    told = replace(plain, groups=np.array([7, 7, 9, 9]))
    share = take_share(LabelledData(told, told), ByGroup(), 0, 2, 0)
    assert len(share.train) == 2


def test_feature_noise_of_a_share_leaves_held_out_examples_clean() -> None:
    examples = Examples(np.full((40, 3), 0.5), np.zeros(40, np.int64))
    share = take_share(LabelledData(examples, examples), FeatureNoise(0.5), 1, 2, 0)
    assert share.train.inputs.std() > 0.3
    assert share.held_out.inputs.std() == 0
