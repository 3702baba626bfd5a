"""Figures and pictures of trained models."""

from timm_jem.evaluation.classification import accuracy, expected_calibration_error, predict
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
