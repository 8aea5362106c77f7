"""Pictures: each is a PNG of the numbers it was given, written whole or not at all."""

import warnings

import matplotlib
import numpy as np
import pytest
import torch
from conftest import randn
from matplotlib.figure import Figure

from engine import plots
from engine.plots import contact_sheet, plot_curves, plot_histograms, plot_losses, plot_rows, rank_histogram


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = plots.save
    monkeypatch.setattr(
        plots, "save", lambda figure, *a, **b: (figures.append(figure), save(figure, *a, **b))[0]
    )
    return figures


def is_png(path) -> bool:
    """Whether a file is a PNG and the only one in its folder."""
    return path.read_bytes().startswith(b"\x89PNG") and list(path.parent.iterdir()) == [path]


def test_contact_sheet_shows_the_best_clips_of_random_captions(tmp_path, drawn):
    asked = []

    def frames_of(video: int) -> np.ndarray:
        asked.append(video)
        return np.full((5, 6, 9, 3), 40 * video, np.uint8)

    scores, owner = randn(20, 4), torch.arange(4).repeat_interleave(5)
    captions = [f"caption {k}" for k in range(20)]
    contact_sheet(tmp_path / "sheet.png", scores, owner, captions, frames_of, queries=3, shown=2)
    assert is_png(tmp_path / "sheet.png")
    texts = [int(axis.texts[0].get_text().split()[1]) for axis in drawn[0].axes if axis.texts]
    assert len(texts) == 3 and asked == [
        int(k) for t in texts for k in scores[t].argsort(descending=True)[:2]
    ]
    rank = 1 + int((scores[texts[0]] > scores[texts[0], owner[texts[0]]]).sum())
    assert drawn[0].axes[0].texts[1].get_text() == f"own clip: rank {rank} of 4"
    framed = [
        bool(axis.patches) for axis in drawn[0].axes if axis.images
    ]  # green where the clip is the caption's
    assert framed == [
        video == owner[t] for t, pair in zip(texts, zip(asked[::2], asked[1::2])) for video in pair
    ]


def frame(video: int) -> np.ndarray:
    return np.zeros((2, 4, 6, 3), np.uint8)


def test_contact_sheet_frames_the_other_clips_that_fit(tmp_path, drawn):
    scores, relevant = torch.tensor([[4.0, 3, 2, 1]]), torch.tensor([[False, True, True, False]])
    for known in (None, relevant):
        contact_sheet(tmp_path / "sheet.png", scores, torch.tensor([2]), ["a cat"], frame, known, shown=4)
    for figure, solid in zip(drawn, ([[], [], [True], []], [[], [False], [True], []])):
        assert [[p.get_linestyle() == "-" for p in axis.patches] for axis in figure.axes[1:]] == solid


CAPTIONS = [
    "pays $5 and then $6", "$\\frac{$", "$$", "a_b^{c % # &", "two\nlines\tand\r\na null \x00",
    "x" * 3000, "word " * 1000, "a smile \U0001f600", "half a character \ud83d", "", "男人在弹吉他。" * 20,
]  # fmt: skip


def test_every_caption_is_drawn_as_it_is(tmp_path, drawn):
    """Dollar signs are no formula, and a character without a glyph gives no warning."""
    count = len(CAPTIONS)
    with warnings.catch_warnings(action="error"):
        contact_sheet(
            tmp_path / "sheet.png", randn(count, 2), torch.zeros(count, dtype=torch.long), CAPTIONS,
            frame, queries=count, shown=1,
        )  # fmt: skip
    shown = [axis.texts[0].get_text() for axis in drawn[0].axes if axis.texts]
    assert shown[:2] == ["pays $5 and then $6\n", "$\\frac{$\n"]
    assert shown[4].startswith("two lines and a null")
    assert all(len(text.split("\n")) <= 5 and len(text) < 140 for text in shown)


def test_wide_characters_take_two_places():
    assert plots.wrap("word " * 100).split("\n")[0] == "word word word word word word"
    assert {len(line) for line in plots.wrap("男" * 100).split("\n")[:3]} == {15}


def test_no_picture_reads_formulas(tmp_path, drawn):
    """Names of rows, panels and axes; and matplotlib's own formulas, such as 10^2, are plain numbers."""
    odd = "$\\frac{$"
    plot_rows(tmp_path / "a.png", {odd: {odd: [1.0, 2]}}, (odd,))
    plot_rows(tmp_path / "b.png", {f"{odd}, {odd} = 1": {odd: [1.0]}}, (odd,), {f"{odd}, {odd} = 1": 1}, odd)
    plot_histograms(tmp_path / "c.png", {odd: {odd: [100.0]}}, {odd: np.array([0.0, 1])})
    plot_curves(tmp_path / "d.png", {odd: {odd: {0: [(1, 2.0)]}}})
    rank_histogram(tmp_path / "e.png", torch.tensor([1.0, 200]), 3000)
    labels = [label.get_text() for label in drawn[-1].axes[0].get_xticklabels()]
    assert {"1", "10", "100", "1000"} <= {*labels}


def test_a_users_settings_of_formulas_and_latex_do_not_matter(tmp_path):
    with matplotlib.rc_context({"text.usetex": True, "text.parse_math": True}):
        plot_losses(tmp_path / "loss.png", [{"step": 1, "loss": 2.0}])
        assert matplotlib.rcParams["text.usetex"]  # unchanged
    assert is_png(tmp_path / "loss.png")


def test_rank_histogram_counts_all_captions(tmp_path, drawn):
    rank_histogram(tmp_path / "ranks.png", torch.tensor([1.0, 1, 2.5, 30]), 30)
    assert is_png(tmp_path / "ranks.png")
    captions, chance = drawn[0].axes[0].patches
    assert captions.get_data().values.sum() == pytest.approx(100)
    assert chance.get_data().values.sum() == pytest.approx(100)


@pytest.mark.parametrize("parts, labels", [
    (("L_ce",), ["loss"]), (("L_s", "L_sup"), ["loss", "L_s", "L_sup"]), (("L_mine",), ["loss", "L_mine"]),
])  # fmt: skip
def test_losses_are_drawn_by_name(tmp_path, drawn, parts, labels):
    rows = [dict(step=step, loss=1 / step, **dict.fromkeys(parts, 0.5)) for step in (10, 20, 30)]
    rows += [dict(step=30, val={"t2v": {"R@1": 10.0, "R@5": 30.0, "R@10": 50.0}}), dict(step=30, done=True)]
    plot_losses(tmp_path / "loss.png", rows)
    assert is_png(tmp_path / "loss.png")
    left, right = drawn[0].axes
    assert [line.get_label() for line in left.lines] == labels
    assert [list(line.get_ydata()) for line in right.lines] == [[10.0], [30.0], [50.0]]


def test_a_run_without_rows_still_has_its_picture(tmp_path):
    plot_losses(tmp_path / "loss.png", [])
    assert is_png(tmp_path / "loss.png")


def test_rows_are_dots_of_seeds_and_their_mean(tmp_path, drawn):
    rows = {
        "X-Pool": {"t2v R@1": [40.0, 44.0], "v2t R@1": [1, 3]},
        "not run": {},
        "T-MASS": {"t2v R@1": [50.0]},
    }
    plot_rows(tmp_path / "rows.png", rows, ("t2v R@1", "v2t R@1"))
    assert is_png(tmp_path / "rows.png")
    left, right = drawn[0].axes
    assert [list(np.atleast_1d(line.get_xdata())) for line in left.lines] == [[40, 44], [42], [50], [50]]
    assert [label.get_text() for label in left.get_yticklabels()] == ["X-Pool", "T-MASS"]
    assert [list(np.atleast_1d(line.get_xdata())) for line in right.lines] == [[1, 3], [2]]


def test_rows_with_an_axis_are_one_line_a_group(tmp_path, drawn):
    rows = {
        f"{name}, T' = {k}": {"t2v R@1": [k, k + 2.0]} for name in ("X-Pool", "T-MASS") for k in (4, 8, 12)
    }
    places = {name: float(name.rpartition(" ")[2]) for name in rows}
    plot_rows(tmp_path / "rows.png", rows, ("t2v R@1",), places, "T'")
    (panel,) = drawn[0].axes
    assert panel.get_legend_handles_labels()[1] == ["X-Pool", "T-MASS"]
    assert [list(c.lines[0].get_ydata()) for c in panel.containers] == [[5, 9, 13]] * 2
    plot_rows(tmp_path / "rows.png", {"M = 1": {"t2v R@1": [7]}}, ("t2v R@1",), {"M = 1": 1}, "M")
    assert drawn[1].axes[0].get_legend_handles_labels()[1] == ["T-MASS, paper"]


def test_histograms_have_the_values_of_their_bins(tmp_path, drawn):
    edges = {"cosine": np.linspace(-0.5, 1, 4), "loss": np.linspace(0, 15, 4)}
    plot_histograms(tmp_path / "h.png", {name: {"T-MASS": [20, 50.0, 30]} for name in edges}, edges)
    assert is_png(tmp_path / "h.png")
    for axis, (name, own) in zip(drawn[0].axes, edges.items()):
        assert axis.get_xlabel() == name
        assert axis.patches[0].get_data().values.tolist() == [20, 50, 30]
        assert axis.patches[0].get_data().edges.tolist() == own.tolist()


def test_curves_have_a_line_a_seed_and_their_mean_if_the_steps_agree(tmp_path, drawn):
    same = {0: [(10, 2.0), (20, 1.0)], 1: [(10, 4.0), (20, 3.0)]}
    other = {0: [(10, 2.0)], 1: [(10, 4.0), (20, 3.0)], 2: []}
    curves = {"X-Pool": {"training loss": same, "validation R@1": other}}
    plot_curves(tmp_path / "curves.png", curves)
    assert is_png(tmp_path / "curves.png")
    left, right = drawn[0].axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[2, 1], [4, 3], [3, 2]]
    assert len(right.lines) == 2 and left.get_legend_handles_labels()[1] == ["X-Pool"]


def test_pictures_leave_pyplot_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(matplotlib, "use", lambda *_, **__: pytest.fail("the backend was changed"))
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    rank_histogram(tmp_path / "ranks.png", torch.tensor([1.0, 2]), 3)
    assert plt.get_fignums() == before


def test_a_picture_that_cannot_be_written_raises_and_leaves_the_older_one(tmp_path, monkeypatch):
    path = tmp_path / "ranks.png"
    rank_histogram(path, torch.tensor([1.0, 2]), 3)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        rank_histogram(path, torch.tensor([2.0, 2]), 3)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
