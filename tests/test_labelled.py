"""What doesn't fit is one line, wherever it is given: shapes that disagree would be broadcast, and other types compared."""

import math

import numpy as np
import pytest
import torch

import timm_jem
from timm_jem import InputError
from timm_jem.evaluation.attacks import PGDConfig, margin, pgd, pixel_classifier
from timm_jem.evaluation.calibration import reliability
from timm_jem.evaluation.chain_length import best_num_steps, chains_by_length
from timm_jem.evaluation.classification import accuracy, in_batches, predict
from timm_jem.evaluation.extractors import extract, load_extractor
from timm_jem.evaluation.generation import (
    nearest_neighbours,
    pyramid,
    sample_quality,
    thumbnails,
    within_class_distance,
)
from timm_jem.evaluation.illustrations import distal_adversarials, interpolation_paths
from timm_jem.evaluation.judges import fit_judge
from timm_jem.evaluation.ood import ood_metrics, ood_scores
from timm_jem.evaluation.ood_sets import interpolations
from timm_jem.evaluation.robustness import is_correct, robust_correct

N, CLASSES = 6, 3
Y = torch.arange(N) % CLASSES
IMAGES = torch.randint(256, (N, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
UNIT, PIXELS, LOGITS = IMAGES / 255, IMAGES / 127.5 - 1, torch.eye(CLASSES)[Y]
PIXEL_FEATURES = load_extractor("pixels", input_size=(1, 8, 8))


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def jem():
    return timm_jem.create_model("wrn_10_1", num_classes=CLASSES, input_size=(1, 8, 8))


OF_LABELS = {
    "accuracy": lambda jem, y: accuracy(LOGITS, y),
    "reliability": lambda jem, y: reliability(LOGITS, y),
    "predict": lambda jem, y: predict(jem, [(IMAGES, y)]),
    "margin": lambda jem, y: margin(LOGITS, y),
    "is_correct": lambda jem, y: is_correct(pixel_classifier(jem), UNIT, y),
    "robust_correct": lambda jem, y: robust_correct(pixel_classifier(jem), UNIT, y, PGDConfig(), [0.0], generator=seeded()),
    "pgd": lambda jem, y: pgd(pixel_classifier(jem), UNIT, y, PGDConfig(steps=1), generator=seeded()),
    "interpolations": lambda jem, y: interpolations(IMAGES, y, 4, seeded()),
    "fit_judge": lambda jem, y: fit_judge(IMAGES, y),
    "judge.accuracy": lambda jem, y: fit_judge(IMAGES, Y).accuracy(IMAGES, y),
    "within_class_distance": lambda jem, y: within_class_distance(IMAGES, y),
}
BAD_LABELS = {
    "short": Y[:3],
    "long": torch.cat([Y, Y]),
    "one": Y[:1],
    "column": Y[:, None],
    "scalar": torch.tensor(1),
    "floats": Y.float(),
    "bools": Y > 0,
    "complex": Y.to(torch.complex64),
    "text": "012012",
    "nothing": None,
}
OF_IMAGES = {
    "predict": lambda jem, x: predict(jem, [(x, Y)]),
    "ood_scores": lambda jem, x: ood_scores(jem, x),
    "extract": lambda jem, x: extract(PIXEL_FEATURES, x),
    "fit_judge": lambda jem, x: fit_judge(x, Y),
    "judge.predict": lambda jem, x: fit_judge(IMAGES, Y).predict(x),
    "interpolations": lambda jem, x: interpolations(x, Y, 4, seeded()),
    "nearest_neighbours": lambda jem, x: nearest_neighbours(x, IMAGES),
    "within_class_distance": lambda jem, x: within_class_distance(x, Y),
}
BAD_IMAGES = {
    "floats": UNIT,
    "int64": IMAGES.long(),
    "one without a batch": IMAGES[0],
    "none": IMAGES[:0],
    "numpy": IMAGES.float().numpy(),
    "a number": 3,
    "nothing": None,
}
OF_UNIT = {
    "is_correct": lambda jem, x: is_correct(pixel_classifier(jem), x, Y),
    "pgd": lambda jem, x: pgd(pixel_classifier(jem), x, Y, PGDConfig(steps=1), generator=seeded()),
}
BAD_UNIT = {
    "8-bit": IMAGES,
    "pixels": PIXELS,
    "0 to 255": IMAGES.float(),
    "nan": UNIT * math.nan,
    "colour": UNIT.expand(N, 3, 8, 8),
}
OF_PIXELS = {
    "interpolation_paths": lambda jem, u: interpolation_paths(jem, u, PIXELS),
    "best_num_steps": lambda jem, u: best_num_steps(jem, u, Y, [21], generator=seeded()),
}
BAD_PIXELS = {
    "8-bit": IMAGES,
    "nan": PIXELS * math.nan,
    "colour": PIXELS.expand(N, 3, 8, 8),
    "nothing": None,
    "numpy": PIXELS.numpy(),
}
OTHERS = {
    "far from pixels": lambda jem: interpolation_paths(jem, IMAGES.float(), PIXELS),
    "no batches": lambda jem: predict(jem, []),
    "labels that no chain has": lambda jem: chains_by_length(jem, [30], y=Y + 1, generator=seeded()),
    "classes that no image has": lambda jem: distal_adversarials(jem, Y + 1),
    "batches of nothing": lambda jem: in_batches(IMAGES, Y, 0),
    "flat thumbnails": lambda jem: thumbnails(PIXELS.flatten(1)),
    "thumbnails of no rows": lambda jem: thumbnails(PIXELS[:, :, :0]),
    "a flat pyramid": lambda jem: pyramid(PIXELS.flatten(1)),
    "huge features": lambda jem: sample_quality(torch.randn(9, 3).double() * 1e150, torch.randn(9, 3)),
    "an extractor of no name": lambda jem: load_extractor(None, input_size=(1, 8, 8)),
    "one radius": lambda jem: robust_correct(pixel_classifier(jem), UNIT, Y, PGDConfig(), 0.1, generator=None),
    "a judge of other sizes": lambda jem: fit_judge(IMAGES, Y).predict(IMAGES[..., :4]),
}
CASES = {
    f"{function} of {bad}": lambda jem, call=call, value=value: call(jem, value)
    for calls, values in ((OF_LABELS, BAD_LABELS), (OF_IMAGES, BAD_IMAGES), (OF_UNIT, BAD_UNIT), (OF_PIXELS, BAD_PIXELS))
    for function, call in calls.items()
    for bad, value in values.items()
}


@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_what_does_not_fit_is_one_line(jem, case):
    with pytest.raises(InputError) as error:
        {**CASES, **OTHERS}[case](jem)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("function", OF_LABELS)
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int32, np.uint64, list])
def test_labels_of_any_whole_type_are_the_same(jem, function, kind):
    def plain(found):
        return str(vars(found) if hasattr(found, "__dict__") else found)

    of_kind = Y.tolist() if kind is list else Y.numpy().astype(kind)
    assert plain(OF_LABELS[function](jem, of_kind)) == plain(OF_LABELS[function](jem, Y))


def test_average_precisions_are_no_more_than_one():
    inside = torch.tensor([1.0, 2.0, 3.0])
    outside = torch.randn(20, generator=torch.Generator().manual_seed(0)) - 9
    for size in range(1, 20):
        found = ood_metrics(inside, outside[:size])
        assert all(0 <= value <= 1 for value in found.values())
