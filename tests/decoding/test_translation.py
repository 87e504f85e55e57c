"""The length penalty, against the formula of the paper."""

import itertools

import pytest

from tfm.decoding.translation import length_penalty


def test_the_length_penalty_is_the_paper_s():
    for length, alpha in itertools.product((1, 7, 40), (0.0, 0.6, 1.0)):
        assert float(length_penalty(length, alpha)) == pytest.approx((5 + length) ** alpha / (5 + 1) ** alpha)
