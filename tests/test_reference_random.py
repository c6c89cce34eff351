"""The random numbers and roundings of the references, against published and exact values."""

import numpy as np
import pytest
import torch

from partune.ops.philox import philox, philox_words
from partune.ops.rounding import round_stochastic

# Random123, tests/kat_vectors: philox4x32 10; counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, output):
    tensors = tuple(torch.tensor([word]) for word in words(counter))
    assert [int(word) for word in philox_words(tensors, tuple(words(key)))] == words(output)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_counters_and_keys_are_made_of_our_numbers(counter, key, output):
    c, k = words(counter), words(key)
    index = torch.tensor([c[0] | c[1] << 32], dtype=torch.uint64).view(torch.int64)
    # A step beyond 32 bits counts by its low word, and a negative seed is a seed.
    seed = int(np.uint64(k[0] | k[1] << 32).astype(np.int64))
    drawn = philox(index, step=c[2] + 2**32, parameter_id=c[3], seed=seed)
    assert [int(word) for word in drawn] == words(output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_values_stay_for_every_random_word(dtype):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    for word in (0, 1, 0x1FFF, 0xFFFF, 0xFFFFFFFF):
        random = torch.full(values.shape, word)
        rounded = round_stochastic(values.float(), dtype, random)
        assert torch.equal(rounded.isnan(), values.isnan())
        assert torch.equal(rounded[~values.isnan()], values[~values.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "value", [1.0 + 2**-12, -3.1415926, 2.0**-15 * 1.37, -(2.0**-25), 2.0**-26 * 1.5, 65519.0]
)
def test_values_go_to_a_neighbour_with_the_probability_of_the_rest(dtype, value):
    count = 1 << 20
    random = torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(0))
    value = torch.tensor(value, dtype=torch.float32)
    rounded = round_stochastic(value.expand(count).contiguous(), dtype, random).double()
    below, above = (float(bound) for bound in (rounded.min(), rounded.max()))
    assert below <= float(value) <= above and len(rounded.unique()) <= 2
    if above > below and above != float("inf"):
        share = (float(value) - below) / (above - below)
        assert (rounded == above).double().mean().item() == pytest.approx(share, abs=3e-3)


def test_overflow_and_what_is_no_number():
    ones = torch.full((5,), 0xFFFFFFFF)
    values = torch.tensor([65519.0, float("inf"), -float("inf"), float("nan"), 3.4e38])
    rounded = round_stochastic(values, torch.float16, ones)
    assert rounded[:3].tolist() == [float("inf"), float("inf"), -float("inf")]
    assert rounded[3].isnan() and rounded[4] == float("inf")
    assert round_stochastic(values, torch.bfloat16, ones)[3].isnan()


def test_magnitudes_far_below_the_smallest_half_vanish():
    values = torch.tensor([2.0**-60, -(2.0**-100), 0.0, 1e-45])
    rounded = round_stochastic(values, torch.float16, torch.full((4,), 0xFFFFFFFF))
    assert rounded.tolist() == [0.0, 0.0, 0.0, 0.0]
