"""Keyed streams and the noise of rounds."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.privacy.noise import RoundNoise
from fedgrpc.privacy.streams import RandomStream, derived_key, word_dtype

KEY = bytes(range(32))


def test_words_are_the_keystream_of_rfc_8439() -> None:
    # Section 2.3.2's key with a zero nonce, as `cryptography` computes it byte by byte.
    expected = Cipher(algorithms.ChaCha20(KEY, bytes(16)), None).encryptor().update(bytes(40))
    assert RandomStream(KEY).words(10, 32).tobytes() == expected


def test_a_derived_key_is_that_of_rfc_5869() -> None:
    # Test case 3 (no salt, no info), its first 32 bytes.
    assert derived_key(b"\x0b" * 22, b"").hex().startswith("8da4e775a563c18f715f802a063c5a31")


@given(bits=st.integers(1, 64), counts=st.lists(st.integers(0, 50), max_size=6))
def test_words_come_in_the_same_order_however_they_are_drawn(bits: int, counts: list[int]) -> None:
    parts, whole = RandomStream(KEY), RandomStream(KEY)
    drawn = [parts.words(count, bits) for count in counts]
    together = whole.words(sum(counts), bits)
    assert np.array_equal(np.concatenate([np.empty(0, word_dtype(bits)), *drawn]), together)
    assert all(int(word) >> bits == 0 for word in together)


def test_normals_have_the_moments_of_the_normal_distribution() -> None:
    drawn = RandomStream(KEY).normals(400_001)
    assert drawn.size == 400_001
    assert abs(drawn.mean()) < 5 / 400_001**0.5
    assert [round(float((drawn**power).mean()), 1) for power in (2, 4)] == [1.0, 3.0]
    # Neighbours come from one pair of uniform numbers, and yet do not depend on each other.
    assert abs(np.corrcoef(drawn[0:-1:2], drawn[1::2])[0, 1]) < 0.01


def test_a_round_that_is_computed_again_draws_the_same_noise() -> None:
    first, second = (RoundNoise(KEY, 7, tree=True).normals("conv.weight", 99) for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("tree", [False, True])
def test_keys_rounds_and_tensors_have_noise_of_their_own(tree: bool) -> None:
    noises = [
        RoundNoise(KEY, 1, tree).normals("a", 8),
        RoundNoise(KEY, 2, tree).normals("a", 8),
        RoundNoise(KEY, 1, tree).normals("b", 8),
        RoundNoise(bytes(32), 1, tree).normals("a", 8),
    ]
    assert len({noise.tobytes() for noise in noises}) == 4


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 8, 64])
def test_the_noise_of_a_trees_sum_is_that_of_as_many_nodes_as_the_round_has_bits(rounds: int) -> None:
    total = sum(RoundNoise(KEY, step, tree=True).normals("w", 20_000) for step in range(1, rounds + 1))
    assert np.var(total) == pytest.approx(rounds.bit_count(), rel=0.06)


def test_the_noise_of_a_plain_sum_grows_with_the_rounds() -> None:
    total = sum(RoundNoise(KEY, step).normals("w", 20_000) for step in range(1, 33))
    assert np.var(total) == pytest.approx(32, rel=0.06)
