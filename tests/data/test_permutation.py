"""The keyed permutation and its hash: a bijection for every size, computed number by number, that looks random."""

import itertools

import numpy as np
import pytest

from tfm.data.permutation import Permutation, derive_key, hash64


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 10, 63, 64, 65, 1000, 4096, 10_007, 70_001])
def test_is_a_bijection(size):
    images = Permutation(size, key=5)(np.arange(size))
    assert images.dtype == np.int64
    assert np.array_equal(np.sort(images), np.arange(size))


@pytest.mark.parametrize("size", [100_000_000, 2**33 + 1])
def test_large_sizes_stay_in_range_and_never_repeat(size):
    numbers = np.concatenate([np.arange(50_000), size - 1 - np.arange(50_000)])
    images = Permutation(size, key=5)(numbers)
    assert images.min() >= 0
    assert images.max() < size
    assert len(np.unique(images)) == len(numbers)
    assert abs(images.mean() / size - 0.5) < 0.005  # standard deviation of that mean: 0.0009


def test_an_image_does_not_depend_on_its_company():
    permutation = Permutation(100_003, key=9)
    whole = permutation(np.arange(100_003))
    some = np.array([99_999, 0, 41_234, 7])
    assert np.array_equal(permutation(some), whole[some])
    assert len(permutation(np.arange(0))) == 0


def test_every_order_of_three_is_as_frequent():
    numbers = np.arange(3)
    seen = [tuple(Permutation(3, key)(numbers).tolist()) for key in range(1200)]
    counts = [seen.count(order) for order in itertools.permutations(range(3))]
    assert sum((count - 200) ** 2 / 200 for count in counts) < 25.7  # chi-square, 5 degrees of freedom, p = 0.0001


def test_looks_random():
    size = 40_000
    numbers = np.arange(size)
    images = Permutation(size, key=3)(numbers)
    other = Permutation(size, key=4)(numbers)
    for a, b in [(numbers, images), (images[:-1], images[1:]), (images, other), (images[:-200], images[200:])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.025  # five standard deviations
    cells = np.bincount(numbers * 20 // size * 20 + images * 20 // size, minlength=400)
    assert ((cells - 100) ** 2 / 100).sum() < 500  # chi-square, about 361 degrees of freedom
    assert (images == numbers).sum() < 10  # a random permutation has one fixed point on average


def test_hash_is_splitmix64():
    # The first outputs of the generator seeded with 0, whose state is counted up by its increment.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hash64(np.arange(1, 4), key=0).tolist() == expected


def test_keys_depend_on_each_part_and_their_order():
    keys = {derive_key(*parts) for parts in [("a", 1), (1, "a"), ("a", 2), ("a", "1"), ("a", 1, 0), ("a",)]}
    assert len(keys) == 6
    assert derive_key("a", 1) == derive_key("a", 1)
    assert all(0 <= key < 2**64 for key in keys)
