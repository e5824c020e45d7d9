"""Figures are elements that a page can hold, and their axes read as counts and losses do."""

import math
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from ldm_jax.pages import plots


@pytest.fixture
def axes():
    return Figure().add_subplot()


def tick_labels(axis):
    axis.axes.figure.draw_without_rendering()
    return [label.get_text() for label in axis.get_ticklabels() if label.get_text()]


def test_chart_is_one_element_that_names_nothing_outside():
    def paint(axes):
        plots.curve(axes, [0, 1], [1, 2], color=plots.BLUE, label="a", band=([0, 1], [2, 3]))
        plots.level(axes, 1.5, "known")

    text = plots.svg(paint, title='a < b & "c"', size=(3.0, 2.0))
    assert "http" not in text
    element = ElementTree.fromstring(text.replace("xlink:href", "href"))
    assert element.attrib["aria-label"] == 'a < b & "c"'
    shown = [node.text for node in element.iter("text")]
    assert 'a < b & "c"' in shown
    assert "known" in shown


def test_charts_of_other_titles_share_no_id():
    def ids(title):
        text = plots.svg(lambda axes: axes.plot([0, 1], "o-"), title=title, size=(3.0, 2.0))
        element = ElementTree.fromstring(text.replace("xlink:href", "href"))
        return {node.attrib["id"] for node in element.iter() if "id" in node.attrib}

    assert ids("one")
    assert ids("one").isdisjoint(ids("two"))


def test_examples_are_counted_in_thousands_and_millions(axes):
    axes.set_xlim(0, 1_500_000)
    plots.examples_axis(axes)
    assert {"0", "500k", "1M"} <= set(tick_labels(axes.xaxis))


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 0.01], "log"),
        ([1.0, 0.5], "linear"),
        ([], "linear"),
        ([math.nan, math.inf, 0.0, 1.0], "linear"),
    ],
)
def test_positive_axis_is_logarithmic_where_values_span_much(axes, values, scale):
    plots.positive_axis(axes, values)
    assert axes.get_yscale() == scale


def test_logarithmic_axis_has_plain_numbers(axes):
    axes.plot([1.0, 0.01])
    plots.positive_axis(axes, [1.0, 0.01])
    assert {"0.01", "0.1", "1"} <= set(tick_labels(axes.yaxis))
