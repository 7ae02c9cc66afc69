"""Random numbers of devices: the same for each, in whatever order devices ask."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.simulation.draws import DeviceDraws


@given(st.permutations([0, 0, 0, 1, 1, 1, 2, 2, 2]), st.integers(0, 9))
def test_a_device_draws_the_same_numbers_in_whatever_order_devices_ask(order: list[int], seed: int) -> None:
    draws, drawn = DeviceDraws([seed], 3), ([], [], [])
    for device in order:
        drawn[device].append(draws.uniform(device))
    together = DeviceDraws([seed], 3)
    rows = np.array([together.uniforms(np.arange(3)) for _ in range(3)])
    np.testing.assert_array_equal(rows.T, drawn)
    assert draws.taken.tolist() == [3, 3, 3]


def test_draws_go_on_from_the_number_that_was_taken() -> None:
    one, other = DeviceDraws([4, 2], 2), DeviceDraws([4, 2], 2)
    one.normal(1)
    other.taken[:] = one.taken
    assert one.normal(1) == other.normal(1)


def test_numbers_are_uniform_normal_and_exponential_and_those_of_devices_do_not_resemble_each_other() -> None:
    count, everyone = 4000, np.arange(4000)
    draws = DeviceDraws([7], count)
    uniforms = np.array([draws.uniforms(everyone) for _ in range(20)])
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    # 80,000 numbers: four standard errors.
    assert abs(uniforms.mean() - 0.5) < 4 * np.sqrt(1 / 12 / uniforms.size)
    assert abs(np.corrcoef(uniforms[0], uniforms[1])[0, 1]) < 4 / np.sqrt(count)
    assert abs(np.corrcoef(uniforms[0, :-1], uniforms[0, 1:])[0, 1]) < 4 / np.sqrt(count)
    normals = np.array([draws.normal(device) for device in everyone])
    assert abs(normals.mean()) < 4 / np.sqrt(count)
    assert abs(normals.var() - 1) < 4 * np.sqrt(2 / count)
    exponentials = draws.exponentials(everyone, np.full(count, 3.0))
    assert abs(exponentials.mean() - 3) < 4 * 3 / np.sqrt(count)
