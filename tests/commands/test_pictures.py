"""What pictures share: ticks, lines that differ, fonts for any script, and sentences where there can be no picture."""

import itertools
import logging
import math
import runpy
import sys

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib.tables._g_l_y_f import Glyph
from matplotlib import font_manager

from fairseq_implicit.commands import pictures


def labels(axis):
    axis.figure.canvas.draw()
    return [text.get_text() for text in axis.get_ticklabels() if text.get_text()]


@pytest.mark.parametrize(
    "values, counts, expected",
    [
        ([2, 4, 16], True, ["2", "4", "8", "16"]),
        ([1, 2, 3, 4, 6, 8, 12, 16, 24], True, ["1", "2", "4", "8", "16"]),
        ([2, 3], True, ["1", "2", "4"]),
        ([4], True, ["2", "4", "8"]),  # one point lies between two ticks all the same
        ([1], True, ["1", "2"]),
        ([2, 7.7], True, ["2", "4", "8"]),
        ([1, 2**12], True, ["1", "4", "16", "64", "256", "1,024", "4,096"]),
        ([0.3, 40], False, ["0.5", "1", "2", "5", "10", "20", "50"]),
        ([4e-5, 3e-3], False, ["5·10⁻⁵", "10⁻⁴", "2·10⁻⁴", "5·10⁻⁴", "10⁻³", "0.002"]),
        ([1e-9, 1e-1], False, ["10⁻⁹", "10⁻⁸", "10⁻⁷", "10⁻⁶", "10⁻⁵", "10⁻⁴", "10⁻³", "0.01", "0.1"]),
    ],
)
def test_logarithmic_ticks_are_plain_numbers_that_do_not_overlap(values, counts, expected):
    figure, axes = pictures.figure(size=(4, 3))
    pictures.line(axes, values, values, 0, "")
    pictures.logarithmic(axes.xaxis, counts)
    assert labels(axes.xaxis) == expected and len(axes.xaxis.get_minorticklocs()) == 0
    low, high = axes.get_xlim()
    assert low < min(values) and max(values) < high
    boxes = [text.get_window_extent() for text in axes.get_xticklabels() if text.get_text()]
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))


@pytest.mark.parametrize("values", [[0.0, 0.0], [math.nan, math.nan], [-1.0, -2.0]])
def test_nothing_positive_stays_linear(values):
    _, axes = pictures.figure()
    pictures.line(axes, [1, 2], values, 0, "")
    pictures.logarithmic(axes.yaxis)
    assert axes.get_yscale() == "linear"


@pytest.mark.parametrize("updates", [[2, 3], [1], [1, 2, 3], [10, 20], list(range(1, 3000, 7))])
def test_updates_are_whole_numbers(updates):
    _, axes = pictures.figure()
    pictures.line(axes, updates, updates, 0, "")
    pictures.whole_numbers(axes.xaxis)
    assert all(float(label.replace("−", "-")).is_integer() for label in labels(axes.xaxis))


def test_losses_that_hardly_differ_stand_at_their_ticks_in_full():
    _, axes = pictures.figure()
    pictures.line(axes, [2, 4], [6.48956, 6.48995], 0, "")
    assert all(6.489 < float(label) < 6.491 for label in labels(axes.yaxis))
    assert axes.yaxis.get_offset_text().get_text() == ""


@pytest.mark.parametrize(
    "places, expected",
    [
        ([0.0, 1.0, 2.0], ["0", "1", "2"]),
        ([0.0, 0.5, 1.0], ["0", "0.5", "1"]),
        (list(map(float, range(25))), ["0", "3", "6", "9", "12", "15", "18", "21", "24"]),
    ],
)
def test_depth_has_its_ticks_where_states_are(places, expected):
    _, axes = pictures.figure()
    axes.plot(places, places)
    pictures.ticks_at(axes.xaxis, places)
    assert labels(axes.xaxis) == expected


def lab(colour):
    """CIE L*a*b* of a hexadecimal sRGB colour, for D65."""
    rgb = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    x, y, z = np.cbrt(matrix @ linear / [0.95047, 1.0, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_thirty_two_lines_can_be_told_apart():
    """Two colours differ by more than the likes of tab20 (17 and more); one colour comes with two lines and markers."""
    styles = [pictures.style(number) for number in range(32)]
    for number, one in enumerate(styles):
        for other in styles[:number]:
            if one["color"] == other["color"]:
                assert one["linestyle"] != other["linestyle"] and one["marker"] != other["marker"]
            else:
                assert np.linalg.norm(lab(one["color"]) - lab(other["color"])) > 34


@pytest.fixture
def font(tmp_path):
    """A font with 日本語 alone, as if it were installed."""
    build = FontBuilder(1000, isTTF=True)
    names = [".notdef", "a", "b", "c"]
    build.setupGlyphOrder(names)
    build.setupCharacterMap(dict(zip(map(ord, "日本語"), names[1:], strict=True)))
    build.setupGlyf(dict.fromkeys(names, Glyph()))
    build.setupHorizontalMetrics(dict.fromkeys(names, (500, 0)))
    build.setupHorizontalHeader(ascent=800, descent=-200)
    build.setupNameTable({"familyName": "Three Characters", "styleName": "Regular"})
    build.setupOS2()
    build.setupPost()
    build.save(tmp_path / "three.ttf")
    return str(tmp_path / "three.ttf")


@pytest.fixture
def machine(monkeypatch):
    """Fonts that the machine has besides those that come with matplotlib."""
    found = []
    own = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in str(entry.fname)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *args, **kwargs: list(found))
    for cached in (pictures._characters, pictures._say_missing, font_manager._get_font):
        cached.cache_clear()
    yield found
    pictures._characters.cache_clear()


def titled(text):
    figure, axes = pictures.figure()
    axes.set_title(text)
    pictures.line(axes, [1, 2], [1, 2], 0, "training")
    axes.legend()
    pictures.fit_fonts(figure)
    return axes.title


def test_a_title_gets_a_font_that_was_installed_since(machine, font, caplog):
    machine.append(font)
    title = titled("日本語 ode_bert")
    assert title.get_text() == "日本語 ode_bert" and title.get_fontfamily()[-1] == "Three Characters"
    assert not caplog.records
    assert titled("ode_bert Ω Привет").get_fontfamily() == ["sans-serif"]


def test_what_no_font_has_is_written_in_numbers_and_said_once(machine, caplog):
    with caplog.at_level(logging.WARNING, pictures.__name__):
        assert titled("日本 rk2").get_text() == r"\u65e5\u672c rk2"
        assert titled("日本 rk4").get_text() == r"\u65e5\u672c rk4"
    (record,) = caplog.records
    assert "no font of this machine has 日本" in record.getMessage()


def test_a_dollar_begins_no_formula(tmp_path):
    figure, axes = pictures.figure()
    axes.set_title(r"runs/$HOME/\frac{$x")
    pictures.save(figure, str(tmp_path / "new" / "picture.png"))
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (("file/a.png", "Not a directory|File exists"), ("folder.png", "Is a directory")):
        with pytest.raises(pictures.PictureError, match=f"--out .*{name} cannot be written: ({reason})"):
            pictures.check(str(tmp_path / name))
    for name in ("picture", "picture.bmpx"):
        with pytest.raises(pictures.PictureError, match=f"{name}: give the picture a name that ends in .png"):
            pictures.check(str(tmp_path / name))
    pictures.check(str(tmp_path / "new.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_without_matplotlib_a_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    alone = runpy.run_path(pictures.__file__)
    with pytest.raises(alone["PictureError"], match=r"need matplotlib: pip install 'fairseq_implicit\[plots\]'"):
        alone["check"]("losses.png")
