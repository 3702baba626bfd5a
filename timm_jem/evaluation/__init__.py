"""Figures and pictures of trained models.

Measures: ``classification``, ``calibration``, ``ood``, ``attacks``, ``auto_attack``, ``refinement``, ``robustness``,
``generation``, ``extractors``, ``judges``, ``illustrations`` and ``intervals`` are plain functions, each module by itself;
``pictures`` and ``plots`` draw.

Reports: ``settings`` says what to measure, ``subject`` loads it, and each ``*_section`` puts the measures of one kind into a
``section`` of a ``report``; ``comparison`` puts reports side by side. recipes/evaluate.py goes from section to section.
"""

from timm_jem.evaluation.calibration import expected_calibration_error
from timm_jem.evaluation.chain_length import best_num_steps
from timm_jem.evaluation.classification import accuracy, predict
from timm_jem.evaluation.generation import frechet_distance, pyramid, thumbnails
from timm_jem.evaluation.pictures import image_grid

__all__ = [
    "accuracy",
    "best_num_steps",
    "expected_calibration_error",
    "frechet_distance",
    "image_grid",
    "predict",
    "pyramid",
    "thumbnails",
]
