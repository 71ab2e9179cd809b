"""Bytes and floats of pictures: one pair of functions converts between them."""

import pytest
import torch

from t2ilearn.data.pixels import bytes_from_pictures, pictures_from_bytes

ALL = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).expand(3, 1, 256)  # every byte


def test_every_byte_returns_unchanged_through_a_float():
    pictures = pictures_from_bytes(ALL)
    assert pictures.dtype == torch.float32 and pictures.min() == -1 and pictures.max() == 1
    assert torch.equal(bytes_from_pictures(pictures), ALL)


@pytest.mark.parametrize("axes", [(), (2,), (2, 5)])
def test_the_formula_holds_for_any_leading_axes(axes):
    values = torch.randint(256, (*axes, 3, 4, 6), dtype=torch.uint8)
    assert torch.equal(pictures_from_bytes(values), values.float() / 127.5 - 1)
    pictures = torch.randn(*axes, 3, 4, 6)
    expected = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()
    assert torch.equal(bytes_from_pictures(pictures), expected)


def test_colours_on_the_scale_of_bytes_may_be_floats():
    values = 255 * torch.rand(3, 4, 6)
    assert torch.equal(pictures_from_bytes(values), values / 127.5 - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_converted_in_float32_and_float64_stays_exact(dtype):
    pictures = pictures_from_bytes(ALL).to(dtype)
    wide = pictures.double()
    assert torch.equal(bytes_from_pictures(pictures), wide.add(1).mul(127.5).round().byte())
    scaled = pictures_from_bytes(ALL.to(dtype))
    assert scaled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_neither_function_changes_its_argument():
    values, pictures = 255 * torch.rand(3, 4, 6), torch.rand(3, 4, 6, requires_grad=True)
    before = values.clone(), pictures.clone()
    pictures_from_bytes(values), bytes_from_pictures(pictures)
    assert torch.equal(values, before[0]) and torch.equal(pictures, before[1])


def test_conversion_does_not_depend_on_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert pictures_from_bytes(ALL).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
