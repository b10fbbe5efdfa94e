"""How this project draws: axes that a person can read, lines that can be told apart, text in any script.

Of the commands beside it and of the study; needs matplotlib only once something is drawn.
"""

import functools
import logging
import math
import os
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

try:
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
except ModuleNotFoundError as error:
    if error.name != "matplotlib":
        raise
    matplotlib = Figure = None

logger = logging.getLogger(__name__)

# Any two are 34 or more apart in CIELAB, and alternate between dark and light; black is left for what was trained.
COLOURS = ("#0057b7", "#d9480f", "#008a5a", "#e377c2", "#4cc9f0", "#e6a800", "#6b3a1f", "#8d3fb0")
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p")  # one more than colours: the same colour comes with another
FEW = 40  # points of a line, up to which each is marked
MOST_TICKS = 10

# Fonts whose characters are not what their numbers say: placeholders, and glyphs of formulas.
NO_TEXT_FONT = re.compile(r"Last ?Resort|cm[a-z]+10$|STIX(Size|NonUni)")


class PictureError(ValueError):
    """One sentence for the user: why there can be no picture, and what to do."""


def check(path: str) -> None:
    """Finds out before the work is done whether a picture can be written to ``path``; makes its folder.

    Raises:
        PictureError: matplotlib is missing, the name has no known ending, or the file cannot be written.
    """
    if matplotlib is None:
        raise PictureError("pictures need matplotlib: pip install 'fairseq_implicit[plots]', or pip install matplotlib")
    ending = os.path.splitext(path)[1][1:].lower()
    if ending not in FigureCanvasBase.get_supported_filetypes():
        raise PictureError(f"--out {path}: give the picture a name that ends in .png, .svg or .pdf")
    existed = os.path.lexists(path)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path, "ab"):
            pass
        if not existed:
            os.remove(path)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: str, error: OSError) -> PictureError:
    return PictureError(f"--out {path} cannot be written: {error.strerror or error}")


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 4.5)) -> tuple["Figure", Any]:
    """An empty figure of ``size`` inches and its axes: one, or an array ``(columns,)`` or ``(rows, columns)``."""
    # Titles and labels are the user's words: a dollar in them begins no formula. Ticks show the number itself, not what
    # is to be added to another in a corner.
    matplotlib.rcParams.update({"text.parse_math": False, "axes.formatter.useoffset": False})
    found = Figure(figsize=size, dpi=150, layout="constrained")
    axes = found.subplots(rows, columns)
    for one in found.axes:
        one.grid(alpha=0.3)
    return found, axes


def save(found: "Figure", path: str) -> None:
    """Writes a figure, the same bytes for the same figure; makes its folder. Raises PictureError."""
    fit_fonts(found)
    check(path)
    try:
        found.savefig(path, metadata={"Software": None} if path.lower().endswith(".png") else None)
    except OSError as error:
        raise _unwritable(path, error) from None


# --- lines ------------------------------------------------------------------------------------------------------------


def style(number: int) -> dict[str, str]:
    """Colour, line and marker of line ``number`` (from 0). Those of fewer than 33 lines differ in colour or line."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def line(axes, x: Sequence[float], y: Sequence[float], number: int, label: str, **changes) -> None:
    """Draws a line in its own style; its points are marked where they are few. ``changes`` replace the style's."""
    chosen = {**style(number), "linewidth": 1.4, "markersize": 4.5, **changes}
    if len(x) > FEW:
        chosen["marker"] = None
    axes.plot(x, y, label=label, **chosen)


# --- axes -------------------------------------------------------------------------------------------------------------


def whole_numbers(axis) -> None:
    """Ticks at whole numbers only: of updates, samples, evaluations; for an axis that has been drawn on."""
    low, high = axis.get_data_interval()
    if 0 <= high - low < 1:  # matplotlib would divide what lies between two of them
        axis.axes.set(**{f"{axis.axis_name}lim": (low - 1, high + 1)})
    axis.set_major_locator(MaxNLocator(nbins=MOST_TICKS, integer=True, steps=[1, 2, 5, 10]))


def ticks_at(axis, values: Sequence[float]) -> None:
    """Ticks at the places where something was measured, at every second or third of them where they are many."""
    stride = math.ceil(len(values) / MOST_TICKS)
    chosen = list(values)[::stride]
    axis.set_major_locator(FixedLocator(chosen))
    axis.set_major_formatter(FixedFormatter([f"{value:g}" for value in chosen]))


def logarithmic(axis, counts: bool = False) -> None:
    """Makes an axis that has been drawn on logarithmic, with plain numbers at its ticks and nothing between them.

    Without a positive number to show, the axis stays linear.

    Args:
        counts: whole numbers, of evaluations say: ticks at powers of two; otherwise at 1, 2 and 5 times powers of ten.
    """
    low, high = axis.get_data_interval()
    low = low if low > 0 else axis.get_minpos()
    if not (0 < low <= high < math.inf):
        return
    ticks = log_ticks(low, high, counts)
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    margin = (high / low) ** 0.05
    axis.axes.set(**{f"{axis.axis_name}lim": (low / margin, high * margin)})
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FixedFormatter([f"{tick:,.0f}" if counts else plain(tick) for tick in ticks]))


def log_ticks(low: float, high: float, counts: bool) -> list[float]:
    """Two to ten ticks for numbers from ``low`` to ``high``; where fewer than two are near, those beside join."""
    if counts:
        exponents = range(max(0, math.floor(math.log2(low)) - 1), math.ceil(math.log2(high)) + 2)
        series = [2.0**exponent for exponent in exponents]
    else:
        exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        series = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    inside = [tick for tick in series if low / 1.25 <= tick <= high * 1.25]
    if len(inside) < 2:
        below, above = [tick for tick in series if tick < low], [tick for tick in series if tick > high]
        inside = sorted({*below[-1:], *inside, *above[:1]})
    if len(inside) > MOST_TICKS and not counts:
        inside = [tick for tick in inside if f"{tick:e}".startswith("1.0")]
    return inside[:: math.ceil(len(inside) / MOST_TICKS)]


def plain(value: float) -> str:
    """0.002, 50, 5·10⁻⁴: a number as it is written by hand, without the markup of formulas."""
    if 1e-3 < abs(value) < 1e6:
        return f"{value:g}"
    digits, exponent = f"{value:.0e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if digits == "1" else f"{digits}·{power}"


# --- text -------------------------------------------------------------------------------------------------------------


def fit_fonts(found: "Figure") -> None:
    """Gives each text of a figure fonts of this machine that have all of its characters.

    A character that none of them has is written as its escape (\\u65e5), which is said once.
    """
    have = _characters(tuple(matplotlib.rcParams["font.family"]))
    texts = [text for text in found.findobj(Text) if _needed(text.get_text()) - have]
    if not texts:
        return
    families, missing = covering(set().union(*(_needed(text.get_text()) for text in texts)) - have)
    for text in texts:
        text.set_fontfamily([*text.get_fontfamily(), *families])
        text.set_text("".join(_escaped(one) if one in missing else one for one in text.get_text()))
    if missing:
        _say_missing("".join(sorted(missing)))


def covering(characters: set[str]) -> tuple[list[str], set[str]]:
    """Families that have ``characters`` between them, as few as can be found, and the characters that none has."""
    families, missing = [], set(characters)
    _register_new_fonts()
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it tells of each weight that a font lacks
    names = {entry.name for entry in font_manager.fontManager.ttflist if not NO_TEXT_FONT.match(entry.name)}
    # Upright letters without serifs first, as in the rest of the picture.
    candidates = sorted(names, key=lambda name: ("Sans" not in name, "Mono" in name or "Condensed" in name, name))
    while missing and candidates:
        best = max(candidates, key=lambda name: len(missing & _characters((name,))))  # the first of equals
        if not missing & _characters((best,)):
            break
        families.append(best)
        missing -= _characters((best,))
    return families, missing


def _needed(text: str) -> set[str]:
    return {character for character in text if not character.isspace()}


def _escaped(character: str) -> str:
    invisible = unicodedata.category(character) in ("Cc", "Cf")  # joiners of emoji, marks of direction
    return "" if invisible else character.encode("unicode_escape").decode("ascii")


@functools.cache
def _characters(families: tuple[str, ...]) -> frozenset[str]:
    """What the font has that a text of these families is written in."""
    try:
        path = font_manager.findfont(font_manager.FontProperties(family=list(families)))
        font = font_manager.get_font(path)
        found = frozenset(map(chr, font.get_charmap()))
        font.load_char(ord(min(found)))  # fonts of coloured pictures open, and fail at the first glyph
        return found
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def _register_new_fonts() -> None:
    """matplotlib keeps a list of the machine's fonts: one that was installed since is not in it."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:
            try:
                font_manager.fontManager.addfont(path)
            except (OSError, RuntimeError):
                logger.debug("%s is no font that matplotlib can read", path)


@functools.cache
def _say_missing(characters: str) -> None:
    logger.warning(
        "no font of this machine has %s: the picture shows numbers in their place, such as %s; to see them install a "
        "font, for example Noto",
        characters,
        _escaped(characters[-1]),
    )
