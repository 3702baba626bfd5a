"""Plot of where the time of an iteration goes."""

from timm_jem.errors import importing
from timm_jem.speed.profile import KINDS, Profile

with importing("matplotlib", "the picture of a profile", "plots"):
    from matplotlib import colormaps
    from matplotlib.figure import Figure

__all__ = ["draw_profile"]


def draw_profile(profile: Profile, title: str) -> Figure:
    """A bar for each part of an iteration, as long as its milliseconds, of a colour for each kind of operation.

    Raises:
        InputError: matplotlib is not installed (when this module is imported).
    """
    parts = profile.parts
    figure = Figure(figsize=(9, 0.5 * len(parts) + 2.2), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="milliseconds")
    ends = [0.0] * len(parts)
    for number, kind in enumerate(KINDS):
        widths = [1000 * profile.seconds[part].get(kind, 0.0) for part in parts]
        if sum(widths) >= 5 * profile.total:  # half a per cent
            axes.barh(parts, widths, left=ends, label=kind, color=colormaps["tab10"](number % 10))
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return figure
