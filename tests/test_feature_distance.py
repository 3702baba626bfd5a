from types import SimpleNamespace

import pytest
import timm
import torch
from sklearn.covariance import LedoitWolf

import timm_jem
from timm_jem import InputError
from timm_jem.evaluation.feature_distance import ClassFeatures
from timm_jem.evaluation.ood_section import feature_distance


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
    expected = torch.tensor([0.0, 0.0, 0.0, -9.0], dtype=torch.float64)  # the last is three deviations from the second
    torch.testing.assert_close(classes.score(points), expected, atol=0.5, rtol=0.05)
    # By hand, with the library's covariance.
    precision = torch.from_numpy(LedoitWolf(assume_centered=True).fit((features - classes.means[y]).numpy()).precision_)
    by_hand = [((points[3] - mean) @ precision @ (points[3] - mean)).item() for mean in classes.means]
    assert -classes.score(points)[3].item() == pytest.approx(min(by_hand))


def test_classes_without_images_and_images_without_classes_are_left_out():
    features, y, *_ = blobs()
    known = ClassFeatures.fit(features, y)
    more = torch.cat([features, torch.full((9, 5), 1e6, dtype=torch.float64)])
    same = ClassFeatures.fit(more, torch.cat([y + 4, torch.full((9,), -1)]))
    assert torch.equal(known.means, same.means)
    assert torch.equal(known.score(features), same.score(features))


def test_fewer_images_than_dimensions():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(12, 40, generator=generator)
    classes = ClassFeatures.fit(features, torch.arange(12) % 2)
    near, far = classes.score(torch.stack([features[:6].mean(0), features[0] + 100]))
    assert torch.isfinite(near)
    assert far < near


def test_what_is_not_finite_stays_so_and_wrong_input_is_named():
    features, y, *_ = blobs(100)
    classes = ClassFeatures.fit(features, y)
    broken = torch.full((1, 5), float("nan"))
    assert classes.score(torch.cat([broken, features[:1].float()])).isnan().tolist() == [True, False]
    for wrong, message in (
        (lambda: ClassFeatures.fit(features, torch.full_like(y, -1)), "0 images with a label"),
        (lambda: ClassFeatures.fit(broken.repeat(4, 1), y[:4]), "not finite"),
        (lambda: ClassFeatures.fit(features, y[:-1]), "labels"),
        (lambda: ClassFeatures.fit(features[:, :, None], y), r"\(N, D\)"),
        (lambda: classes.score(features[:, :4]), "4 dimensions"),
        (lambda: classes.score("features"), "features"),
    ):
        with pytest.raises(InputError, match=message):
            wrong()


def test_labels_are_all_that_a_model_needs():
    """Any timm classifier gives it; without labels it is left out, and a report says why."""
    model = timm_jem.wrap(timm.create_model("test_resnet", num_classes=4, in_chans=1), input_size=(1, 32, 32))
    images = torch.randint(256, (24, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    subject = SimpleNamespace(model=model, val=images, val_y=torch.arange(24) % 4)
    section = SimpleNamespace(found=SimpleNamespace(warnings=[]))
    ((name, scores),) = feature_distance(subject, 16, section)(images[:5]).items()
    assert (name, scores.shape, section.found.warnings) == ("feature distance", (5,), [])
    subject.val_y = torch.full((24,), -1)
    assert feature_distance(subject, 16, section)(images[:5]) == {}
    assert section.found.warnings == [
        "There is no feature distance: 0 images with a label are too few for the features of classes: give at least two."
    ]
