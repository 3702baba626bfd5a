"""The last layer of a classifier as a function of its features, for methods that shape either."""

import copy

import torch
from torch import Tensor, nn

from timm_jem.backbone import architecture
from timm_jem.errors import InputError, one_line
from timm_jem.model import JEM
from timm_jem.ood.views import View

__all__ = ["FinalLayer"]

# Of logits that the network and its last layer alone give, relative to ‖w‖‖z‖: TensorFloat-32 rounds by this much.
_ROUNDING = 1e-3


class FinalLayer(nn.Module):
    """From features, shape (B, D), to logits, shape (B, num_classes): a copy of timm's ``get_classifier()`` in float32.

    Heads that read the same features, as those of some distilled networks, are averaged, as the networks do.

    Args:
        jem: the model; not changed.

    Raises:
        InputError: a backbone that has no such layer.
    """

    def __init__(self, jem: JEM) -> None:
        super().__init__()
        self.name = architecture(jem.backbone) if hasattr(jem.backbone, "pretrained_cfg") else type(jem.backbone).__name__
        found = getattr(jem.backbone, "get_classifier", lambda: None)()
        found = tuple(found) if isinstance(found, (tuple, list, nn.ModuleList)) else (found,)
        if not found or not all(isinstance(head, nn.Module) for head in found):
            raise InputError(f"{self.name} has no final layer that get_classifier() gives: {self._others}")
        try:
            self.heads = copy.deepcopy(nn.ModuleList(found)).float().eval().requires_grad_(False)
        except RuntimeError as error:  # of weights that are computed, as those of torch.nn.utils.weight_norm
            raise InputError(f"the final layer of {self.name} can't be copied ({one_line(error)}): {self._others}") from error

    _others = "use a detector that shapes neither features nor weights, e.g. energy, knn or mahalanobis"

    def forward(self, features: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of features, shape (B, D)."""
        return sum(_logits(head, features) for head in self.heads) / len(self.heads)

    def matrix(self, width: int) -> tuple[Tensor, Tensor]:
        """Weight, shape (num_classes, D), and bias, shape (num_classes,): what a linear function does to the unit vectors.

        Args:
            width: D.
        """
        if all(isinstance(head, nn.Linear) and head.bias is not None for head in self.heads):
            weight, bias = (sum(getattr(head, name) for head in self.heads) / len(self.heads) for name in ("weight", "bias"))
            return weight.cpu().contiguous(), bias.cpu()
        exact = copy.deepcopy(self).cpu().double()
        bias = exact(torch.zeros(1, width, dtype=torch.float64))[0]
        return (exact(torch.eye(width, dtype=torch.float64)) - bias).T.float().contiguous(), bias.float()

    @torch.no_grad()
    def check(self, seen: View) -> None:
        """Raise an InputError unless the network's logits are this layer's, and linear, of features that it showed."""
        features, logits = seen.features.float(), seen.logits.float()
        try:
            ours = self.to(features.device)(features)
            weight, bias = (t.to(features.device) for t in self.matrix(features.shape[1]))
        except (NotImplementedError, RuntimeError) as error:
            raise InputError(
                f"the final layer of {self.name} doesn't take its features ({one_line(error)}): {self._others}"
            ) from error
        size = weight.norm(dim=1) * features.norm(dim=1, keepdim=True) + bias.abs()
        allowed = 4 * max(_ROUNDING, torch.finfo(seen.logits.dtype).eps) * size + 1e-6
        for logits_of in (ours, features @ weight.T + bias):
            if logits_of.shape != logits.shape or not ((logits_of - logits).abs() <= allowed).all():
                raise InputError(f"the logits of {self.name} are no linear function of its features alone: {self._others}")


def _logits(head: nn.Module, features: Tensor) -> Tensor:
    return head(features[:, :, None, None]).flatten(1) if isinstance(head, nn.Conv2d) else head(features)
