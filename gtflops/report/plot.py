"""Cost over depth with matplotlib, for papers and notebooks of one's own."""

from typing import TYPE_CHECKING

import numpy as np

from gtflops.errors import InputError
from gtflops.profiling import Profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def cost_over_depth(profile: Profile) -> "Figure":
    """What :meth:`gtflops.Profile.plot` gives."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "plotting needs matplotlib, which is not installed: pip install 'gtflops[plot]'; "
            "profile.report('report.html') needs only plotly"
        ) from error

    # Not of pyplot: no window, no back-end, nothing to close.
    figure = Figure(figsize=(9, 5), layout="constrained")
    weights, activations = figure.subplots(2, 1, sharex=True)
    places = np.arange(1, len(profile.names) + 1)
    weights.bar(places, profile.t_dw, width=0.9, color="#2c6cb0")
    weights.set_ylabel("t_dw (FLOP)")
    activations.bar(places, profile.t_dy, width=0.9, color="#d9822b")
    activations.set_ylabel("t_dy (FLOP)")
    activations.set_xlabel("tensors in backward order: loss left, input right")
    summed = activations.twinx()
    summed.step(places, np.cumsum(profile.t_dy), where="post", color="black", linewidth=1)
    summed.set_ylim(bottom=0)
    summed.set_ylabel("sum of t_dy (FLOP)")
    for axes in (weights, activations, summed):
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.spines["top"].set_visible(False)
    # A dollar would begin a formula.
    weights.set_title(profile.graph.model.replace("$", r"\$"), loc="left")
    return figure
