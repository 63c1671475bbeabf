"""Numbers as text: significant digits, units, intervals, and "never" for a seed that did not converge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from fwdlib.statistics import Interval


def number(value: float, digits: int = 3, infinite: str = "never") -> str:
    """Return a number rounded to significant digits, never with an exponent.

    Args:
        value: any number.
        digits: how many significant digits; all digits before the decimal point are kept.
        infinite: the text for an infinite number or nan.

    Example:
        >>> number(0.034567), number(12345.6), number(-7.0), number(float("inf"))
        ('0.0346', '12,346', '−7.00', 'never')
    """
    if not math.isfinite(value):
        return infinite
    magnitude = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded number: 9.999 is 10.0
    decimals = max(0, digits - 1 - magnitude)
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def count(value: float) -> str:
    """Return a count, or a median of counts, which may end in a half.

    Example:
        >>> count(382.0), count(381.5), count(float("inf"))
        ('382', '381.5', 'never')
    """
    return f"{value:,.1f}".removesuffix(".0").replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "never"


def interval(value: Interval, form: Callable[[float], str] = number) -> str:
    """Return ``estimate [low, high]``, or the estimate alone where there is no interval or its ends are the same.

    Example:
        >>> interval(Interval(3.412, 3.5, 3.6)), interval(Interval(100, 100, 100), count)
        ('3.50 [3.41, 3.60]', '100')
    """
    low, estimate, high = (form(end) for end in value)
    return estimate if math.isnan(value.low) or low == estimate == high else f"{estimate} [{low}, {high}]"


def duration(value: Interval | float) -> str:
    """Return seconds, with or without an interval, in the unit that suits the estimate.

    Example:
        >>> duration(0.00123), duration(Interval(1.0, 2.5, float("inf")))
        ('1.23 ms', '2.50 [1.00, never] s')
    """
    value = value if isinstance(value, Interval) else Interval(math.nan, value, math.nan)
    if not math.isfinite(value.estimate):
        scale, unit = 1.0, " s" if math.isfinite(value.low) else ""
    else:
        scale, unit = next(
            (pair for pair in ((1.0, " s"), (1e3, " ms")) if value.estimate * pair[0] >= 1), (1e6, " \N{MICRO SIGN}s")
        )
    return interval(Interval(*(end * scale for end in value))) + unit


def megabytes(value: float) -> str:
    """Return a number of bytes in millions.

    Example:
        >>> megabytes(2_340_000)
        '2.34 MB'
    """
    return f"{number(value / 1e6)} MB"


def times(ratio: Interval) -> str:
    """Return what a ratio of durations says, as the end of a sentence whose subject is the numerator.

    Example:
        >>> times(Interval(2.1, 2.25, 2.5))
        'takes 2.25 [2.10, 2.50] times as long'
    """
    if math.isnan(ratio.estimate):
        return "cannot be compared, as no seed converged,"
    if not ratio.estimate:
        return "converges where backprop does not"
    return f"takes {interval(ratio)} times as long" if math.isfinite(ratio.estimate) else "does not converge"


def enumerated(items: Iterable[str]) -> str:
    """Return the items as a list in a sentence.

    Example:
        >>> enumerated(["a", "b", "c"])
        'a, b and c'
    """
    *rest, last = items
    return f"{', '.join(rest)} and {last}" if rest else last


def scientific(value: float) -> str:
    """Return a number to three digits, with a power of ten where it needs one, in pandoc's Markdown.

    Example:
        >>> scientific(0.000204), scientific(22.7), scientific(0.0), scientific(float("inf"))
        ('2.04 × 10^−4^', '22.7', '0', 'diverged')
    """
    if value == 0 or (math.isfinite(value) and 1e-3 <= abs(value) < 1e6):
        return number(value) if value else "0"
    if not math.isfinite(value):
        return "diverged"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa} \N{MULTIPLICATION SIGN} 10^{int(exponent)}^".replace("-", "\N{MINUS SIGN}")
