import math

import pytest
import torch

from timm_jem import InputError, energy, log_density
from timm_jem.pixels import eight_bit, to_pixels


def test_energies_of_hand_made_logits():
    logits = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]])
    torch.testing.assert_close(energy(logits), torch.tensor([-math.log(4.0), -1.0 - math.log(2.0)]))
    torch.testing.assert_close(energy(logits, torch.tensor([1, 0])), torch.tensor([-math.log(3.0), -1.0]))


def test_softmax_is_the_ratio_of_the_densities():
    logits = torch.randn(5, 7, dtype=torch.float64)
    y = torch.randint(7, (5,))
    p = (log_density(logits, y) - log_density(logits)).exp()
    torch.testing.assert_close(p, logits.softmax(1).gather(1, y[:, None])[:, 0])


def test_large_logits_stay_finite():
    logits = torch.tensor([[3000.0, 2999.0]])
    assert energy(logits).item() == pytest.approx(-3000.3133, abs=1e-3)


def test_half_precision_is_reduced_in_float32():
    logits = torch.randn(4, 10).bfloat16()
    torch.testing.assert_close(energy(logits), energy(logits.float()), rtol=0, atol=0)


def test_logits_labels_and_pixels_of_another_kind_are_named():
    logits = torch.randn(3, 4)
    for call, message in (
        (lambda: energy(logits[0]), r"shape \(4,\)"),
        (lambda: energy(logits[:, :0]), r"\(3, 0\)"),
        (lambda: energy(logits.long()), "int64"),
        (lambda: energy([[1.0]]), "a list"),
        (lambda: energy(logits, torch.tensor([0])), r"int64, shape \(3,\)"),
        (lambda: log_density(logits, torch.tensor([0.0, 1, 2])), "float32"),
        (lambda: energy(logits, [0, 1, 2]), "a list"),
        (lambda: to_pixels([1]), "images are a list"),
        (lambda: to_pixels(logits > 0), "bool"),
        (lambda: eight_bit(logits.long()), "int64"),
        (lambda: eight_bit(None), "NoneType"),
    ):
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_images_are_left_as_they_are():
    images = torch.tensor([[0.0, 255.0]])
    assert to_pixels(images).tolist() == [[-1, 1]]
    assert images.tolist() == [[0, 255]]
