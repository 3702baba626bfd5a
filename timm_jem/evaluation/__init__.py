"""Figures and pictures of trained models.

Each module stands for itself: ``classification``, ``calibration``, ``ood``, ``attacks``, ``refinement``, ``robustness``,
``generation``, ``extractors``, ``judges``, ``illustrations``, ``intervals``, ``report``, ``pictures`` and, with matplotlib,
``plots``. recipes/evaluate.py puts them together.
"""

from timm_jem.evaluation.calibration import expected_calibration_error
from timm_jem.evaluation.classification import accuracy, predict
from timm_jem.evaluation.generation import best_num_steps, frechet_distance, thumbnails
from timm_jem.evaluation.pictures import image_grid

__all__ = [
    "accuracy",
    "best_num_steps",
    "expected_calibration_error",
    "frechet_distance",
    "image_grid",
    "predict",
    "thumbnails",
]
