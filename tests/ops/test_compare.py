import math

import numpy as np
import pytest
import torch

from turbo_nb.ops.compare import psnr, relative_error


def test_relative_error_is_the_quotient_of_norms():
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert relative_error(torch.zeros(3), torch.ones(3)) == 1.0


def test_relative_error_subtracts_in_float64():
    ref = torch.full((1000,), 16777216.0, dtype=torch.float64)
    assert relative_error(ref + 1, ref) == pytest.approx(1 / 16777216.0)
    assert relative_error(torch.tensor([200], dtype=torch.uint8), torch.tensor([250], dtype=torch.uint8)) == 0.2


def test_relative_error_of_a_nan_is_nan():
    assert math.isnan(relative_error(torch.tensor([math.nan, 1.0]), torch.ones(2)))
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.zeros(1)))


def test_relative_error_to_zeros():
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf


def test_psnr_of_pixels():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + 255) == pytest.approx(0.0)
    assert psnr(a + 1, a) == psnr(a, a + 1) == pytest.approx(20 * math.log10(255))  # uint8 does not wrap around
    assert psnr(torch.zeros(4), torch.full((4,), 0.1), peak=1.0) == pytest.approx(20.0, abs=1e-5)


@pytest.mark.parametrize("compare", [psnr, relative_error])
def test_shapes_that_broadcast_are_refused(compare):
    with pytest.raises(ValueError, match=r"\(2, 1\) and \(2,\). Expected equal shapes"):
        compare(torch.zeros(2, 1), torch.zeros(2))
