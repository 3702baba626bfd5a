"""What a model believes, as a section of a report: the paper's pictures."""

from pathlib import Path

import torch
from torch import Tensor

from timm_jem.evaluation.illustrations import distal_adversarials, interpolation_paths
from timm_jem.evaluation.pictures import image_grid, stack_pictures
from timm_jem.evaluation.section import Section
from timm_jem.evaluation.settings import EvaluationConfig
from timm_jem.evaluation.subject import Subject
from timm_jem.modes import frozen
from timm_jem.pixels import to_pixels

__all__ = ["pictures_section"]


def pictures_section(subject: Subject, config: EvaluationConfig, section: Section) -> None:
    """Distal adversarials, lines between test images, and least changes to other classes."""
    first, second = _pairs(subject.test_y)
    _distal(subject, config, section)
    paths, energies = interpolation_paths(
        subject.model, to_pixels(subject.test[first]), to_pixels(subject.test[second]), batch_size=config.batch_size
    )
    captions = [f"E {value:.2f}" for value in energies.flatten().tolist()]
    grid = image_grid(paths.flatten(0, 1), paths.shape[1], captions=captions)
    section.picture("interpolations.png", grid, "Straight lines between two test images, with E(x); lower is likelier.")
    _counterfactuals(subject, config, section, to_pixels(subject.test[first[:4]]))


def _pairs(y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of an image of each of the first five classes there are, and of one of another class beside each, shapes (n,)."""
    first = torch.stack([torch.nonzero(y == label).flatten()[0] for label in y.unique()[:5]])
    # The second of them, for variety; there may be only one.
    second = torch.stack([torch.nonzero(y != y[row]).flatten()[:2][-1] for row in first])
    return first, second


def _distal(subject: Subject, config: EvaluationConfig, section: Section) -> None:
    classes = torch.arange(min(subject.model.num_classes, 10))
    names = [subject.class_names[label] for label in classes]
    test = to_pixels(subject.test[:100])
    shown = []
    for name, model in ((subject.name, subject.model), (config.baseline, subject.baseline)):
        if model is not None:
            u, p = distal_adversarials(model, classes, generator=subject.generator(), batch_size=config.batch_size)
            with torch.no_grad(), frozen(model):
                of_u, of_test = (
                    torch.cat([model.pixel_energy(part.to(model.device)).cpu() for part in v.split(config.batch_size)])
                    for v in (u, test)
                )
            captions = [f"p {a:.2f}  E {b:.1f}" for a, b in zip(p.tolist(), of_u.tolist(), strict=True)]
            title = f"{Path(name).name} (E of test images: {of_test.mean():.1f} on average)"
            shown.append((title, image_grid(u, len(classes), captions=captions, column_names=names)))
    caption = (
        "Distal adversarials: from uniform noise up the slope of log p(y|x) until the classifier is sure, p > 0.9; beneath, "
        "p(y|x) and E(x). Energies of two models can't be compared with each other."
    )
    section.picture("distal.png", stack_pictures(shown), caption)


def _counterfactuals(subject: Subject, config: EvaluationConfig, section: Section, images: Tensor) -> None:
    """``images``, pixels in [-1, 1], shape (n, C, H, W), each changed to each of up to ten classes."""
    model, targets = subject.model, torch.arange(min(subject.model.num_classes, 10))
    starts = model.normalize(images.repeat_interleave(len(targets), 0))
    changed = model.counterfactual(starts, targets.repeat(len(images)), confidence=None, batch_size=config.batch_size)
    numbers = zip(changed.probability.tolist(), changed.energies[:, -1].tolist(), changed.distance.tolist(), strict=True)
    texts, captions, cells = [f"p {p:.2f}  E {e:.1f}  d {d:.1f}" for p, e, d in numbers], [], []
    for i, image in enumerate(images):
        of_image = slice(i * len(targets), (i + 1) * len(targets))
        cells += [image[None], model.denormalize(changed.images[of_image]).cpu()]
        captions += ["test image", *texts[of_image]]
    columns = ["from", *(f"to {subject.class_names[label]}" for label in targets)]
    grid = image_grid(torch.cat(cells), len(columns), captions=captions, column_names=columns)
    caption = (
        "Counterfactuals: the least change to each class under E(x, y), with p(y|x), E(x) and the ℓ2 distance in [-1, 1] "
        "pixels."
    )
    section.picture("counterfactuals.png", grid, caption)
