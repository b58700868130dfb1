"Figures: the same bytes each time, nothing clipped, nothing left behind, plain errors."

import subprocess
import sys
from itertools import combinations, product

import numpy as np
import pytest

from octomed.core.paths import OctomedError
from octomed.evaluate import figures as F

TASKS = {
    "MedQA": ("text_only", 0.6),
    "HeadQA": ("text_only", 0.7),
    "NEJM": ("multimodal_reasoning", 0.4),
}


def dot(task, arm):
    category, accuracy = TASKS[task]
    return {
        "category": category,
        "benchmark": task,
        "arm": arm,
        "accuracy": accuracy,
        "interval": (accuracy - 0.05, accuracy + 0.05),
        "paper": accuracy + 0.03,
        "chance": 0.25,
    }


ROWS = [dot(task, arm) for task, arm in product(TASKS, ("CoT", "direct"))]
FINDINGS = [
    {
        "text": "CoT beats direct",
        "difference": 0.05,
        "interval": (0.01, 0.09),
        "outcome": "agrees",
        "n": 500,
        "paper": 0.1507,
    },
    {
        "text": "Mixing sources does not interfere",
        "difference": 0.0,
        "interval": (-0.05, 0.05),
        "outcome": "undecided",
        "margin": 0.02,
        "paper": "no number given",
    },
]
SERIES = {
    "k = 1": [(1, 0.5, (0.45, 0.55)), (2, 0.6, (0.55, 0.65))],
    "k = 4": [(1, 0.61), (2, 0.61)],
}
MODELS = {
    "Ours": [
        {"name": "smaller", "text": 0.3, "images": 0.41},
        {"name": "ours", "text": 0.4, "images": 0.45, "intervals": {"text": (0.35, 0.45)}},
    ],
    "The paper's": [{"name": "a model with a rather long name-7B", "text": 0.5, "images": 0.451}],
}
PANELS = [
    F.Panel(
        "Ours",
        {**SERIES, "alone, a control with a long name": [(2, 0.55, (0.5, 0.6))]},
        dotted={"chance": [(1, 0.25)]},
    ),
    F.Panel("The paper's", {"k = 4": [(1, 0.85)]}, hollow=True, log=True, xticks=(1, 2)),
]
SHELVES = {
    "Kind": [
        {"name": "novels with a rather long name", "paper": 227_000, "here": 900},
        {"name": "atlases", "here": 4},
    ],
    "Place": [
        {"name": "left", "group": "text_only", "paper": 700},
        {"name": "right", "group": "multimodal_reasoning", "here": 500, "there": 7},
    ],
}


def draw_overview():
    facts = [("traces", "over 8 M", "at most 162,512", "235,360")]
    return F.draw_overview(SHELVES, ["paper", "here", "there"], facts, title="Title")


def draw_overview_without_facts():
    return F.draw_overview(SHELVES, ["paper", "here"], title="Title")


def draw_bars():
    return F.draw_accuracies(ROWS, "Title")


def draw_forest():
    return F.draw_findings(FINDINGS, "Title")


def draw_lines():
    return F.draw_lines(SERIES, "Title", xlabel="epochs", paper={"k = 1": [(1, 0.7516)]})


def draw_lines_with_a_curve_and_a_level():
    dotted = {"k = 1": [(1, 0.52), (2, 0.58)], "start": [(1, 0.4), (2, 0.4)]}
    return F.draw_lines(SERIES, "Title", dotted=dotted)


def draw_panels():
    return F.draw_panels(PANELS, "Title")


def draw_ranks():
    return F.draw_ranks(MODELS, ["text", "images"], "Title", hollow=("The paper's",))


def draw_grid():
    return F.draw_images([np.eye(8)] * 5, list("abcde"), title="Title")


DRAW = {
    "overview": draw_overview,
    "overview without facts": draw_overview_without_facts,
    "bars": draw_bars,
    "forest": draw_forest,
    "lines": draw_lines,
    "lines with a curve and a level": draw_lines_with_a_curve_and_a_level,
    "panels": draw_panels,
    "ranks": draw_ranks,
    "grid": draw_grid,
}


def inside(fig):
    "Every visible text lies on the canvas."
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(fig).draw()
    box = fig.bbox
    for t in fig.findobj(lambda o: hasattr(o, "get_text") and o.get_text() and o.get_visible()):
        e = t.get_window_extent()
        if t.get_text().replace("\N{MINUS SIGN}", "").replace(".", "").isdigit():
            continue  # ticks beyond the axis exist, and are not drawn
        assert e.x0 >= box.x0 - 2 and e.x1 <= box.x1 + 2 and e.y1 <= box.y1 + 2, t.get_text()


@pytest.mark.parametrize("name", DRAW)
def test_same_figure_same_bytes_and_no_label_cut(name, tmp_path):
    fig = DRAW[name]()
    inside(fig)
    first, again = (
        F.save_figure(fig, tmp_path / "one.png"),
        F.save_figure(DRAW[name](), tmp_path / "two"),
    )
    assert [p.name for p in first] == ["one.png", "one.svg"]
    for a, b in zip(first, again, strict=False):
        assert a.read_bytes() == b.read_bytes()
    assert b"<dc:date>" not in first[1].read_bytes()
    assert b"Software" not in first[0].read_bytes()
    assert first[0].stat().st_size < 300_000


def test_paper_points_are_hollow_and_in_per_cent():
    def hollow(fig):
        return sorted(
            round(float(line.get_xdata()[0]), 2)
            for line in fig.axes[0].lines
            if line.get_markerfacecolor() == "white"
        )

    assert hollow(F.draw_accuracies(ROWS)) == [43, 43, 63, 63, 73, 73]
    assert hollow(F.draw_accuracies([r | {"paper": None} for r in ROWS])) == []


def test_a_fitted_curve_has_its_series_colour_and_a_level_its_own_name():
    ax = F.draw_lines(
        SERIES, dotted={"k = 1": [(1, 0.52), (2, 0.58)], "start": [(1, 0.4), (2, 0.4)]}
    ).axes[0]
    (fit, level) = [line for line in ax.lines if line.get_marker() == "None"]
    assert fit.get_color() == ax.lines[0].get_color() == F.COLOURS[0]
    assert list(fit.get_ydata()) == pytest.approx([52, 58])
    assert level.get_color() == F.FAINT
    assert [t.get_text() for t in ax.texts] == ["k = 1", "k = 4", "start"]


def test_panels_have_axes_of_their_own_and_share_their_colours():
    ours, paper = draw_panels().axes
    assert [ax.get_title(loc="left") for ax in (ours, paper)] == ["Ours", "The paper's"]
    assert (ours.get_xscale(), paper.get_xscale()) == ("linear", "log")
    low, high = ours.get_ylim()
    assert low < 25 and high > 65, "the axis holds every point and bar"
    colour = F.COLOURS[1]  # of the second series, in both panels
    (point,) = paper.lines
    assert (point.get_color(), point.get_markerfacecolor()) == (colour, "white")
    drawn = {line.get_marker(): line for line in ours.lines if line.get_color() == colour}
    assert list(drawn["o"].get_ydata()) == pytest.approx([61, 61])
    bars = [line for line in ours.lines if line.get_marker() == "None" and line.get_alpha()]
    assert [list(line.get_ydata()) for line in bars] == [
        pytest.approx(bounds) for bounds in ([45, 55], [55, 65], [50, 60])
    ]
    single = [line for line in ours.lines if line.get_marker() == "D"]
    assert [list(line.get_ydata()) for line in single] == [pytest.approx([55])]
    names = [text.get_text() for text in draw_panels().legends[0].get_texts()]
    assert names == ["k = 1", "k = 4", "alone, a control with a long name", "paper", "chance"]


def test_models_stand_in_the_order_of_their_mean_and_the_paper_is_hollow():
    ours, paper = draw_ranks().axes
    assert [label.get_text() for label in ours.get_yticklabels()] == ["ours", "smaller"]
    dots = [line for line in ours.lines if line.get_marker() == "o"]
    assert [(float(line.get_xdata()[0]), round(line.get_ydata()[0])) for line in dots] == [
        pytest.approx(place) for place in ((40, 0), (45, 0), (30, 1), (41, 1))
    ]
    (interval,) = (line for line in ours.lines if line.get_marker() == "None")
    assert list(interval.get_xdata()) == pytest.approx([35, 45])
    assert {line.get_markerfacecolor() for line in paper.lines} == {"white"}
    assert "white" not in {line.get_markerfacecolor() for line in dots}
    with pytest.raises(OctomedError, match="at least one model"):
        F.draw_ranks({"Ours": []}, ["text"])


def test_counts_are_where_their_axis_says_and_the_paper_is_hollow():
    kind = DRAW["overview"]().axes[0]
    assert kind.get_xscale() == "log"
    assert [t.get_text() for t in kind.get_yticklabels()] == [
        "novels with a rather long name",
        "atlases",
    ]
    assert sorted(
        (float(line.get_xdata()[0]), line.get_markerfacecolor() == "white") for line in kind.lines
    ) == [(4, False), (900, False), (227_000, True)]
    assert all(kind.get_xlim()[0] < line.get_xdata()[0] < kind.get_xlim()[1] for line in kind.lines)


def test_facts_do_not_touch_each_other():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    fig = DRAW["overview"]()
    FigureCanvasAgg(fig).draw()
    boxes = [t.get_window_extent() for t in fig.axes[-1].texts]
    assert len(boxes) == 7
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_nothing_is_left_behind():
    import matplotlib
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    for draw in DRAW.values():
        draw()
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def test_labels_at_line_ends_do_not_touch():
    at = F._spread([0.5, 0.51, 0.52, 0.9], 0.05)
    assert min(abs(a - b) for a, b in combinations(at, 2)) >= 0.05 - 1e-9
    assert at[3] == 0.9
    assert at[:3] == sorted(at[:3])


def test_bad_input_gets_a_sentence():
    for draw in (
        lambda: F.draw_accuracies([]),
        lambda: F.draw_findings([]),
        lambda: F.draw_lines({"a": []}),
        lambda: F.draw_panels([F.Panel("a", {"b": []})]),
        lambda: F.draw_overview({"a": [{"name": "b", "paper": 0}]}, ["paper"]),
    ):
        with pytest.raises(OctomedError, match="nothing to draw"):
            draw()
    with pytest.raises(OctomedError, match="as many of each"):
        F.draw_images([np.eye(2)], ["a", "b"])


def test_matplotlib_is_imported_only_when_drawing():
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, octomed.evaluate.figures, octomed.evaluate.stats; "
            "assert 'matplotlib' not in sys.modules",
        ],
        check=True,
    )


@pytest.mark.parametrize("label", ["ward", "a benchmark with a rather long name"])
def test_the_key_of_a_figure_of_accuracies_stays_on_the_figure(label):
    rows = [
        {
            "arm": arm,
            "benchmark": label,
            "accuracy": 0.5,
            "interval": [0.4, 0.6],
            "chance": 0.25,
        }
        for arm in ("cot", "direct", "direct, same compute")
    ]
    fig = F.draw_accuracies(rows)
    legend = fig.axes[0].get_legend()
    extent = legend.get_window_extent()
    assert extent.x1 <= fig.bbox.x1


def test_joins_are_drawn_by_benchmark_part_and_reading():
    from octomed.paper.formatting import figure_of_joins

    row = {"arm": "cot", "benchmark": "clinic_ward:test", "accuracy": 0.5, "interval": [0.4, 0.6]}
    rows = [
        {**row, "joins": "all", "reading": "generated"},
        {**row, "joins": "seen", "reading": "generated"},
        {**row, "joins": "unseen", "reading": "likelihood"},
        {**row, "benchmark": "Overall", "joins": "seen", "reading": "generated"},
    ]
    drawn = [
        label.get_text() for label in figure_of_joins({"rows": rows}).axes[0].get_yticklabels()
    ]
    assert drawn == ["ward, seen: written", "ward, unseen: likeliest"]
    assert figure_of_joins({"rows": rows[:1]}) is None
