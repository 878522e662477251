"""What the difference of two noisy curves shows besides its mean: steps that stand out, and a trend."""

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

FEWEST = 16  # steps below which neither is looked for
OUTSTANDING = 8.0  # of a robust standard deviation: once in 10^15 of normal noise
TREND = 5.0  # of the slope's standard error, which 18 degrees of freedom exceed by chance once in 10^4
_WINDOW = 51
_BLOCKS = 20


def outliers(values: Values) -> NDArray[np.bool_]:
    """Which values stand out of those around them: further from their median than 8 robust standard deviations.

    The median is that of 25 values on either side, mirrored at the ends. The standard deviation is 1.4826 times the
    median absolute deviation from these medians (Rousseeuw and Croux 1993), which spikes, unlike a variance, do not
    raise. Where more than half of the values agree exactly it is 0, and all others stand out.
    """
    if len(values) < FEWEST:
        return np.zeros(len(values), dtype=bool)
    half = min(_WINDOW, len(values)) // 2
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, half, mode="reflect"), 2 * half + 1)
    apart = np.abs(values - np.median(windows, axis=1))
    return apart > OUTSTANDING * 1.4826 * np.median(apart)


def drift(steps: Values, values: Values) -> tuple[float, bool]:
    """How far a straight line through the values moves from the first step to the last, and whether that is no chance.

    The line is fitted to the means of up to 20 blocks, whose errors are independent even where those of neighbouring
    steps are not.
    """
    if len(values) < FEWEST:
        return 0.0, False
    blocks = np.array_split(np.arange(len(values)), min(_BLOCKS, len(values) // 4))
    x, y = (np.array([series[block].mean() for block in blocks]) for series in (steps, values))
    x_centred = x - x.mean()
    slope = float((x_centred * y).sum() / np.square(x_centred).sum())
    rest = y - y.mean() - slope * x_centred
    freedom = max(1, len(blocks) - 2)
    error = float(np.sqrt(np.square(rest).sum() / freedom / np.square(x_centred).sum()))
    return slope * float(steps[-1] - steps[0]), abs(slope) > TREND * error
