"""One section of a report, while it is measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from timm_jem.errors import InputError, one_line
from timm_jem.evaluation.intervals import wilson_interval
from timm_jem.evaluation.plots import save_figure
from timm_jem.evaluation.report import Measured, Result

__all__ = ["BASIC_BOOTSTRAP", "BOOTSTRAP", "WILSON", "Section"]

WILSON = "Wilson, 95 %"
BOOTSTRAP = "bootstrap over images, 95 %"
# An ECE is too large by chance alone, and the percentiles of resamples twice: of a calibrated model they held the truth in none
# of 200 simulations each with 360, 2,000 and 10,000 images, the basic interval in 44 to 80 %, by the model's confidence, and in
# 85 to 95 % where the true ECE is 0.01 or more. Kumar et al., NeurIPS 2019 (arXiv 1909.10155), take it in their released code.
BASIC_BOOTSTRAP = (
    "basic bootstrap over images, 95 %, without the part of the value that is chance, and so lower, at times than the value "
    "itself; too narrow where the true value is near 0"
)


@dataclass
class Section:
    """Collects what one section measures.

    Attributes:
        found: what becomes part of a report as a whole, or not at all.
        folder: where its pictures are written as soon as they are made.
    """

    found: Measured
    folder: Path

    @property
    def curves(self) -> dict[str, Any]:
        """Data of plots that comparisons overlay, by the plot's name."""
        return self.found.curves

    def add(self, table: str, row: str, value: float, n: int, protocol: str, column: str = "", **more: Any) -> Result:
        """One number of ``n`` images; ``more`` are other fields of a :class:`timm_jem.evaluation.report.Result`."""
        self.found.results.append(Result(self.found.title, table, row, column, float(value), n, protocol, **more))
        return self.found.results[-1]

    def share(self, table: str, row: str, correct: Tensor, protocol: str, column: str = "", **more: Any) -> Result:
        """A proportion of images, from ``correct``, bool, shape (n,), with Wilson's interval."""
        low, high = wilson_interval(int(correct.sum()), len(correct))
        value = correct.double().mean().item()
        return self.add(table, row, value, len(correct), protocol, column, low=low, high=high, interval=WILSON, **more)

    def curve(
        self, table: str, correct: Mapping[float, Tensor], named: Callable[[float], str], protocol: str, **more: Any
    ) -> tuple[list[float], list[float], list[float], list[float]]:
        """Proportions that depend on a size, a row each, ``named`` by it.

        Returns:
            Sizes, values, and lower and upper ends of the intervals: what :func:`timm_jem.evaluation.plots.accuracy_curves`
            draws.
        """
        results = [self.share(table, named(size), right, protocol, **more) for size, right in correct.items()]
        return list(correct), [r.value for r in results], [r.low for r in results], [r.high for r in results]

    def picture(self, file: str, picture: Any, caption: str) -> None:
        """Write a PIL image or a matplotlib figure as ``file``, a PNG.

        Raises:
            InputError: it can't be written.
        """
        save = picture.save if isinstance(picture, Image.Image) else lambda path: save_figure(picture, path)
        try:
            save(self.folder / file)
        except OSError as error:
            raise InputError(f"{file} can't be written to {self.folder} ({one_line(error)}): make room") from error
        self.found.pictures.append((file, caption))

    def warn(self, text: str) -> None:
        """What a reader must know before believing the numbers."""
        self.found.warnings.append(text)
