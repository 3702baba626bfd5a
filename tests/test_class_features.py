import pytest
import torch
from sklearn.covariance import LedoitWolf

from timm_jem import InputError
from timm_jem.ood import ClassFeatures


def blobs(n=4000, classes=3):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % classes
    centres = 10 * torch.eye(classes, 5, dtype=torch.float64)
    spread = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.1], dtype=torch.float64)
    return centres[y] + spread * torch.randn(n, 5, generator=generator, dtype=torch.float64), y, centres, spread


def test_the_distance_is_that_of_the_gaussians():
    features, y, centres, spread = blobs()
    classes = ClassFeatures.fit(features, y)
    torch.testing.assert_close(classes.means, centres, atol=0.3, rtol=0)
    points = torch.cat([centres, centres[1:2] + spread * torch.tensor([0.0, 0.0, 0.0, 3.0, 0.0])])
    expected = torch.tensor([0.0, 0.0, 0.0, 9.0], dtype=torch.float64)  # the last is three deviations from the second
    torch.testing.assert_close(classes.distance(points), expected, atol=0.5, rtol=0.05)
    # By hand, with the library's covariance.
    precision = torch.from_numpy(LedoitWolf(assume_centered=True).fit((features - classes.means[y]).numpy()).precision_)
    by_hand = [((points[3] - mean) @ precision @ (points[3] - mean)).item() for mean in classes.means]
    assert classes.distance(points)[3].item() == pytest.approx(min(by_hand))


def test_classes_without_images_and_images_without_classes_are_left_out():
    features, y, *_ = blobs()
    known = ClassFeatures.fit(features, y)
    more = torch.cat([features, torch.full((9, 5), 1e6, dtype=torch.float64)])
    same = ClassFeatures.fit(more, torch.cat([y + 4, torch.full((9,), -1)]))
    assert torch.equal(known.means, same.means)
    assert torch.equal(known.distance(features), same.distance(features))


def test_fewer_images_than_dimensions():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(12, 40, generator=generator)
    classes = ClassFeatures.fit(features, torch.arange(12) % 2)
    near, far = classes.distance(torch.stack([features[:6].mean(0), features[0] + 100]))
    assert torch.isfinite(near)
    assert far > near


def test_what_is_not_finite_stays_so_and_wrong_input_is_named():
    features, y, *_ = blobs(100)
    classes = ClassFeatures.fit(features, y)
    broken = torch.full((1, 5), float("nan"))
    assert classes.distance(torch.cat([broken, features[:1].float()])).isnan().tolist() == [True, False]
    for wrong, message in (
        (lambda: ClassFeatures.fit(features, torch.full_like(y, -1)), "0 images with a label"),
        (lambda: ClassFeatures.fit(broken.repeat(4, 1), y[:4]), "not finite"),
        (lambda: ClassFeatures.fit(features, y[:-1]), "labels"),
        (lambda: ClassFeatures.fit(features[:, :, None], y), r"\(N, D\)"),
        (lambda: classes.distance(features[:, :4]), "4 dimensions"),
        (lambda: classes.distance("features"), "features"),
    ):
        with pytest.raises(InputError, match=message):
            wrong()
