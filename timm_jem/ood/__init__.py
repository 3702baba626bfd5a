"""Out-of-distribution detectors over any timm classifier: a score of images, and a threshold; nothing is trained.

``views`` is what detectors see of images, and ``final_layer`` what of a network. ``scores`` and ``class_features`` have the
formulas that are ours, ``from_pytorch_ood`` those of that library; ``methods`` is the table of all. ``detector`` puts them
together, and ``stored`` reads and writes what was fitted. One sign everywhere, pytorch-ood's: higher = further out; "energy" is
E(x) itself.
"""

from timm_jem.ood.class_features import ClassFeatures
from timm_jem.ood.detector import Detector, detector, score_all
from timm_jem.ood.methods import METHODS
from timm_jem.ood.views import survey

__all__ = ["METHODS", "ClassFeatures", "Detector", "detector", "score_all", "survey"]
