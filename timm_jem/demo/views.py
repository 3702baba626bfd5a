"""What the page shows, as HTML: pictures, beliefs, energies. Whatever a model or a person named is escaped."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

from timm_jem.pixels import eight_bit
from timm_jem.prediction import Prediction
from timm_jem.reference import Reference

__all__ = ["belief", "curve", "grid", "histogram", "note", "number", "percent", "picture", "problem", "text"]

_WIDTH, _HEIGHT = 360, 120  # of a chart, in its own units, which are about pixels on a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 6, 6, 16, 30
_BINS = 24
_LOSSLESS = 64  # a side; larger pictures are sent as JPEG
_SHOWN = 5  # classes


def text(value: object) -> str:
    """As HTML that means nothing but itself, in the page's templates either."""
    return "".join(f"&#{ord(c)};" if c in "{}$`\\" else c for c in escape(str(value)))


def note(words: str) -> str:
    """A line of explanation."""
    return f'<p class="note">{text(words)}</p>'


def problem(words: object) -> str:
    """A line that says what was wrong, which screen readers read at once."""
    return f'<p class="problem" role="alert">{text(words)}</p>'


def picture(u: Tensor, alt: str) -> str:
    """One image, pixels in [-1, 1], shape (C, H, W) with one or three channels.

    Raises:
        InputError: a pixel is NaN.
    """
    pixels = eight_bit(u).cpu().movedim(0, -1).numpy()
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    kind, options = ("png", {}) if max(image.size) <= _LOSSLESS else ("jpeg", {"quality": 92})
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f'<img alt="{text(alt)}" src="data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}">'


def grid(u: Tensor, alts: Sequence[str], captions: Sequence[str]) -> str:
    """Images beside each other, pixels in [-1, 1], shape (B, C, H, W), each with a caption."""
    cells = zip(u, alts, captions, strict=True)
    shown = (f"<figure>{picture(one, alt)}<figcaption>{text(caption)}</figcaption></figure>" for one, alt, caption in cells)
    return f'<div class="pictures">{"".join(shown)}</div>'


def belief(u: Tensor, prediction: Prediction, names: Sequence[str], reference: Reference | None) -> str:
    """An image, pixels in [-1, 1], shape (C, H, W), and all that the model says of it."""
    if reference is not None and prediction.temperature is not None:
        calibrated = f"calibrated on {reference.n:,} held-out images"
    else:
        why = "" if reference is None else f": {reference.uncalibrated}"
        calibrated = f"as the network has them, not calibrated{why}"
    return (
        f'<div class="belief"><div class="subject">{picture(u, "the picture as the model sees it")}</div><div>'
        f'<p class="verdict"><b>{text(prediction.label)}</b> <span>{text(percent(prediction.p))}</span></p>'
        f"{_bars(prediction.probabilities, names)}{note(f'Probabilities {calibrated}.')}</div>"
        f"<div>{_flag(prediction, reference)}{histogram(prediction.energy, reference)}</div></div>"
    )


def number(value: float, digits: int = 2) -> str:
    """With a minus sign, not a hyphen."""
    return f"{value:.{digits}f}".replace("-", "−")


def percent(p: float) -> str:
    """A probability, without claiming certainty and without a line break."""
    return ">\u00a099.9\u00a0%" if p > 0.999 else "<\u00a00.1\u00a0%" if p < 0.001 else f"{100 * p:.1f}\u00a0%"


def _bars(probabilities: Tensor, names: Sequence[str]) -> str:
    likeliest = probabilities.topk(min(_SHOWN, len(probabilities)))
    rows = "".join(
        f'<tr><th scope="row">{text(names[i])}</th><td class="bar"><i style="width:{100 * p:.1f}%"></i></td>'
        f"<td>{text(percent(p))}</td></tr>"
        for p, i in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
    )
    return f'<table class="bars"><caption class="hidden">The likeliest classes</caption>{rows}</table>'


def _flag(prediction: Prediction, reference: Reference | None) -> str:
    """Whether the image is like the held-out ones, in words."""
    if reference is None:
        return (
            f'<p class="flag unknown"><b>Energy {number(prediction.energy)}</b> '
            "There are no held-out images to compare it with, so nothing is flagged.</p>"
        )
    share = f"{prediction.percentile:.0f} % of {reference.n:,} held-out images have a lower energy."
    if prediction.outlier:
        return f'<p class="flag outlier"><b>Unlike the training data</b> Energy {number(prediction.energy)}: {share}</p>'
    return f'<p class="flag usual"><b>Like the training data</b> Energy {number(prediction.energy)}: {share}</p>'


def histogram(energy: float, reference: Reference | None) -> str:
    """The held-out images' energies, the one at hand among them, and where images begin to be flagged."""
    if reference is None or not math.isfinite(energy):
        return ""
    known = np.asarray(reference.quantiles)
    width = max(known[-1] - known[0], 1e-9)
    low, high = known[0] - 0.1 * width, known[-1] + 0.1 * width
    low, high = (max(min(low, energy - 0.05 * width), low - width), min(max(high, energy + 0.05 * width), high + width))
    edges = np.linspace(low, high, _BINS + 1)
    shares = np.diff(np.interp(edges, known, np.linspace(0, 1, len(known)), left=0, right=1))
    x = _scale(low, high, _LEFT, _WIDTH - _RIGHT)
    base, tallest = _HEIGHT - _BOTTOM, shares.max()
    bars = ""
    for a, b, share in zip(edges, edges[1:], shares, strict=False):
        height, where = (base - _TOP) * share / tallest, "beyond" if (a + b) / 2 > reference.threshold else "within"
        place = f'x="{x(a):.1f}" y="{base - height:.1f}" width="{x(b) - x(a) - 1:.1f}" height="{height:.1f}"'
        bars += f'<rect {place} class="{where}"/>'
    at = x(min(max(energy, low), high))
    off = " ›" if energy > high else "‹ " if energy < low else ""
    says = f"{off}this picture" if off.startswith("‹") else f"this picture{off}"
    anchor = "start" if at < _WIDTH / 4 else "end" if at > 3 * _WIDTH / 4 else "middle"
    edge = x(min(max(reference.threshold, low), high))
    told = f"Energies of held-out images from {number(known[0])} to {number(known[-1])}, of this picture {number(energy)}"
    return _svg(
        f"{bars}"
        f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="{_TOP}" y2="{base}" class="threshold"/>'
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{base}" class="here"/>'
        f'<text x="{at:.1f}" y="{_TOP - 5}" text-anchor="{anchor}" class="here">{says}</text>'
        f'<text x="{_LEFT}" y="{base + 13}">{number(low, 1)}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{base + 13}" text-anchor="end">{number(high, 1)}</text>'
        f'<text x="{_WIDTH / 2}" y="{base + 13}" text-anchor="middle">held-out images</text>'
        f'<text x="{_LEFT}" y="{base + 26}">← likelier</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{base + 26}" text-anchor="end">stranger →</text>',
        told,
    )


def curve(
    energies: Sequence[float],
    total: int,
    reference: Reference | None,
    *,
    first: int = 0,
    at: int | None = None,
    shares: Sequence[float] = (),
    share_of: str = "",
) -> str:
    """Energy against steps, above the range of nine in ten held-out images.

    Args:
        energies: E(x), one a step.
        total: the last step there may be.
        reference: held-out images, or None.
        first: the step of the first energy.
        at: which of them is shown; None: the last.
        shares: probabilities of the class ``share_of``, one a step, or none.
    """
    usual = () if reference is None else (reference.quantiles[5], reference.quantiles[95])
    finite = [e for e in (*energies, *usual) if math.isfinite(e)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    x, base = _scale(0, max(total, 1), _LEFT, _WIDTH - _RIGHT), _HEIGHT - _BOTTOM
    y = _scale(low, high, base, _TOP)
    at = len(energies) - 1 if at is None else at
    points = " ".join(f"{x(first + i):.1f},{y(e):.1f}" for i, e in enumerate(energies) if math.isfinite(e))
    band = key = ""
    if usual:
        top, bottom = y(usual[1]), y(usual[0])
        size = f'y="{top:.1f}" width="{_WIDTH - _LEFT - _RIGHT}" height="{max(bottom - top, 1):.1f}"'
        band = f'<rect x="{_LEFT}" {size} class="usual"/>'
        key = f'<text x="{_WIDTH - _RIGHT}" y="{base + 26}" text-anchor="end">shaded: 9 in 10 held-out images</text>'
    if shares:
        along, up = " ".join(f"{x(first + i):.1f},{base + (_TOP - base) * p:.1f}" for i, p in enumerate(shares)), shares[at]
        band += f'<polyline points="{along}" class="share"/>'
        band += (
            f'<text x="{_WIDTH / 2}" y="{_TOP - 5}" text-anchor="middle">dashed: p({text(share_of)}) {text(percent(up))}</text>'
        )
    now = energies[at]
    dot = f'<circle cx="{x(first + at):.1f}" cy="{y(now):.1f}" r="4" class="here"/>' if math.isfinite(now) else ""
    return _svg(
        f'{band}<polyline points="{points}"/>{dot}'
        f'<text x="{_LEFT}" y="{_TOP - 5}" class="here">energy {number(now)}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{_TOP - 5}" text-anchor="end">step {first + at} of {total}</text>'
        f'<text x="{_LEFT}" y="{base + 26}">steps →</text>{key}',
        f"Energy from {number(energies[0])} to {number(now)} at step {first + at} of {total}",
    )


def _scale(low: float, high: float, start: float, end: float):
    """Values of [low, high] to places between ``start`` and ``end``."""
    width = high - low or 1.0
    return lambda value: start + (end - start) * (value - low) / width


def _svg(inside: str, told: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(told)}">{inside}</svg>'
