from __future__ import annotations

import io

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from defectlib.report import figures, sheet


def image(value=0.0, size=8):
    return torch.full((3, size, size), value)


def mask(size=8):
    filled = torch.zeros(1, size, size, dtype=torch.bool)
    filled[:, 2:4, 3:6] = True
    return filled


def drawn(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=sheet.DPI)
    return np.asarray(Image.open(buffer).convert("RGB"))


def test_pixels_of_images_masks_and_maps():
    assert sheet.pixels(image(-1.0)).max() == 0 and sheet.pixels(image(1.0)).min() == 255
    assert sorted(np.unique(sheet.pixels(mask()))) == [0, 255]
    trimap = torch.tensor([[[0.0, 0.5, 1.0]]])
    assert sheet.pixels(trimap)[0, :, 0].tolist() == [0, 128, 255]
    assert sheet.pixels(np.full((4, 4), 1.0, np.float32)).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (torch.full((3, 4, 4), 200.0), r"images in \[-1, 1\], got \[200, 200\]"),
        (np.full((4, 4), -1.0), r"masks and maps in \[0, 1\]"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), "a sheet takes images"),
        (torch.full((1, 4, 4), float("nan")), "got"),
    ],
)
def test_out_of_range_cells_are_refused(cell, message):
    with pytest.raises(ValueError, match=message):
        figures.sheet([[cell]])


def test_outline_runs_along_pixel_edges():
    edges = sheet.outline(mask())
    # 2 x 3 pixels: a perimeter of 10 unit edges
    assert edges.shape == (10, 2, 2)
    assert np.abs(edges[:, 0] - edges[:, 1]).sum(axis=1).tolist() == [1] * 10
    assert edges.min(axis=(0, 1)).tolist() == [3, 2] and edges.max(axis=(0, 1)).tolist() == [6, 4]


def test_outline_at_the_border_of_the_image():
    assert len(sheet.outline(torch.ones(1, 3, 4, dtype=torch.bool))) == 14


def test_sheet_pixels_are_crisp_and_in_place():
    checker = (torch.arange(64).reshape(8, 8) % 2 * 2 - 1).float().expand(3, 8, 8).contiguous()
    shown = drawn(figures.sheet([[checker, image(1.0)]], scale=4))
    assert shown.shape[:2] == (2 + 32 + 2, 2 + 32 + sheet.GAP + 32 + 2)
    block = shown[2:34, 2:34]
    expected = np.kron((checker[0].numpy() + 1) / 2 * 255, np.ones((4, 4))).astype(np.uint8)
    assert (block == expected[..., None]).all()


@pytest.mark.parametrize("side", [1, 12])
def test_sheet_sizes(side):
    figure = figures.sheet(
        [[image(size=64)] * side] * side, row_labels=["a_row"] * side, column_labels=["poke_insulation"] * side
    )
    width, height = figure.get_size_inches() * sheet.DPI
    assert isinstance(figure, Figure) and width < 1300 and height < 1300


def texts(figure):
    return [text.get_window_extent() for text in figure.axes[0].texts], figure.bbox


@pytest.mark.parametrize("columns", [1, 4, 8, 12])
def test_labels_do_not_overlap_and_are_not_cut(columns):
    figure = figures.sheet(
        [[image(size=64)] * columns] * 2,
        row_labels=["contamination\ncrop_paste", "x"],
        column_labels=["poke_insulation_of_cable", "crack", "t = 0", "a b"] * 3
        if columns == 12
        else ["broken_large"] * columns,
    )
    figure.draw_without_rendering()
    boxes, page = texts(figure)
    for box in boxes:
        assert box.x0 >= page.x0 - 0.5 and box.y1 <= page.y1 + 0.5 and box.x1 <= page.x1 + 1.5
    level = [b for b, text in zip(boxes, figure.axes[0].texts) if text.get_rotation() == 0]
    for i, first in enumerate(level):
        assert not any(first.overlaps(second) for second in level[i + 1 :])


def test_a_title_and_captions_have_room_of_their_own():
    words = {
        "title": "A title that is longer than all of the two columns\nand its second line",
        "captions": [["a"] * 2] * 3,
        "row_labels": ["a label that moves the title to the right"] * 3,
    }
    figure = figures.sheet([[image(size=64)] * 2] * 3, column_labels=["left", "right"], scale=1, **words)
    figure.draw_without_rendering()
    boxes, page = texts(figure)
    cells = [shown.get_window_extent() for shown in figure.axes[0].images]
    assert len(boxes) == 6 + 2 + 3 + 1 and len(cells) == 6
    for i, box in enumerate(boxes):
        assert box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 - 0.5 and box.y1 <= page.y1
        assert not any(box.overlaps(other) for other in [*boxes[i + 1 :], *cells])


def test_ragged_rows_and_empty_places():
    shown = drawn(figures.sheet([[image(-1.0), image(-1.0)], [image(-1.0), None]], scale=2))
    assert (shown[2:18, 24:38] < 10).any() and (shown[24:36, 24:36] == 255).all()


def test_folded_rows_go_on_beside_under_the_same_headings(monkeypatch):
    names = [f"row {i}" for i in range(5)]
    monkeypatch.setattr(sheet, "WIDEST", 650)  # as wide as three of them
    figure = figures.sheet(
        [[image(size=64), None]] * 5, names, ["left", "right"], scale=1, fold=2, missing="none",
        captions=[["a\nb", "c"]] * 5,
    )  # fmt: skip
    figure.draw_without_rendering()
    boxes, page = texts(figure)
    said = [text.get_text() for text in figure.axes[0].texts]
    assert [said.count(word) for word in ("left", "right", "none", "a\nb", "c", *names)] == [3, 3, 5, 5, 0, *[1] * 5]
    cells = [shown.get_window_extent() for shown in figure.axes[0].images]
    place = {name: box for name, box in zip(said, boxes)}
    assert place["row 0"].y0 == place["row 2"].y0 == place["row 4"].y0 > place["row 1"].y0 == place["row 3"].y0
    assert cells[0].x0 < place["row 2"].x0 < cells[2].x0 < place["row 4"].x0 < cells[4].x0
    for i, box in enumerate(boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 - 0.5 <= box.y0 and box.y1 <= page.y1
        assert not any(box.overlaps(other) for other in [*boxes[i + 1 :], *cells])


def test_a_system_has_its_colour_whatever_stands_beside_it():
    with matplotlib.rc_context(fname=figures.STYLE):
        alone, among = (
            figures._colours(names) for names in (["adabldm"], ["shots_only", "crop_paste", "other", "adabldm"])
        )
    assert alone["adabldm"] == among["adabldm"] and len(set(among.values())) == 4


def test_large_images_are_averaged_not_sampled():
    stripes = torch.ones(3, 512, 512)
    stripes[:, ::2] = -1
    shown = drawn(figures.sheet([[stripes] * 8]))
    assert shown[10:100, 10:100].min() > 100 and shown[10:100, 10:100].max() < 156


def test_outlines_are_drawn():
    plain, outlined = (drawn(figures.sheet([[image()]], outline_masks=m, scale=8)) for m in (None, [[mask()]]))
    red = (outlined[..., 0].astype(int) - outlined[..., 1] > 100).sum()
    assert red > 40 and (plain[..., 0] == plain[..., 1]).all()
    assert (drawn(figures.overlay(image(), mask(), scale=8)) == outlined).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [[]]}, "at least one image"),
        ({"rows": [[image()]], "row_labels": ["a", "b"]}, "1 rows but 2 row labels"),
        ({"rows": [[image()]], "column_labels": []}, "1 columns but 0 column labels"),
        ({"rows": [[image()]], "outline_masks": [[]]}, "a place"),
        ({"rows": [[image()]], "outline_masks": [[mask(4)]]}, "does not fit"),
        ({"rows": [[image()]], "captions": [["a", "b"]]}, "captions must have a text for every cell"),
    ],
)
def test_bad_sheets(arguments, message):
    with pytest.raises(ValueError, match=message):
        figures.sheet(**arguments)


def scores():
    rows = [
        (m, s, k, 0.5 + 0.1 * s) for m in ("crop_paste", "shots_only") for s in (0, 1) for k in ("accuracy", "pixel_ap")
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "metric", "value"])


def gates():
    rows = [
        (m, kind, block, f"{block}.{i}", tau, gate, 1.0)
        for m in ("symmetry_aware", "symmetry_aware_prior") for kind in ("background", "interaction", "fusion")
        for block in ("down_blocks.0", "mid_block") for i in range(2) for tau, gate in ((0.0, 1.2), (1.0, 0.8))
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["method", "kind", "block", "layer", "tau", "gate", "start"])


def charts():
    numbers = pd.DataFrame({"n": [4, 4, 8, 8] * 2, "kid": np.linspace(0, 1, 8), "pair": ["a"] * 4 + ["b"] * 4})
    table = pd.DataFrame({"method": ["shots_only"], "metric": ["accuracy"], "reproduced": [57.1], "sd": [0.8]})
    return {
        "compare": figures.compare(scores()),
        "compare_table": figures.compare(table),
        "confusion": figures.confusion({"shots_only": np.array([[3, 1], [0, 4]])}, ["crack", "stain"]),
        "confusion_7": figures.confusion(np.eye(7), [f"a_long_defect_{i}" for i in range(7)]),
        "similarity": figures.similarity({"symmetry_aware": np.eye(2)}, ["crack", "stain"]),
        "gates": figures.gates(gates()),
        "curves": figures.curves(numbers, x="n", y="kid", hue="pair"),
        "strip": figures.strip(numbers.assign(kid=numbers["kid"] + 0.01), x="kid", y="pair", line=0.053, log=True),
        "spread": figures.spread(numbers, x="n", y="kid", hue="pair"),
        "chosen": figures.chosen(
            numbers, x="n", y="kid", hue="pair", picks={"a": (4, 0.0), "b": (8, 1.0), "c": (4, 0.0)}
        ),
        "learning": figures.learning(scores().assign(axis="samples", n=4)),
        "sheet": figures.sheet([[image(), mask()]], row_labels=["x"], outline_masks=[[mask(), None]]),
    }


def test_learning_curves_share_their_scale_and_mark_every_seed():
    rows = [
        ("pixel_ap", axis, n, method, seed, 10.0 * n + seed)
        for axis, numbers in (("shots", (2, 8)), ("samples", (0, 4)))
        for n in numbers for method in ("shots_only", "crop_paste") for seed in (0, 1)
        if (axis, method) != ("samples", "shots_only")
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["metric", "axis", "n", "method", "seed", "value"])
    samples, shots = figures.learning(frame).axes
    assert (samples.get_xlabel(), shots.get_xlabel()) == tuple(figures.LEARNING_AXES.values())
    assert samples.get_ylim() == shots.get_ylim()
    dots = [line.get_ydata().tolist() for line in samples.lines if line.get_marker() == "."]
    assert dots == [[40, 41]], "one method over samples, two seeds a point"
    (bars,) = samples.containers
    assert bars.lines[0].get_ydata().tolist() == [40.5]
    (alone,) = [line for line in samples.lines if line.get_linestyle() == "--"]
    assert set(alone.get_ydata()) == {0.5}, "no samples: the shots alone, across"
    assert not [line for line in shots.lines if line.get_linestyle() == "--"]
    with pytest.raises(ValueError, match="no number to show"):
        figures.learning(frame.assign(value=np.nan))


def test_panels_have_their_own_lines_and_scale():
    frame = pd.DataFrame({"step": [1, 2, 1, 2], "loss": [1.0, 0.5, 90.0, 80.0], "m": ["a", "a", "b", "b"], "fit": "x"})
    upper, lower = figures.curves(frame, "step", "loss", hue="fit", panel="m").axes
    assert [axes.get_title(loc="left") for axes in (upper, lower)] == ["a", "b"]
    assert [line.get_ydata().tolist() for axes in (upper, lower) for line in axes.lines] == [[1, 0.5], [90, 80]]
    assert upper.get_ylim()[1] < 2 < lower.get_ylim()[0]


def test_rules_that_pick_one_point_share_its_ring():
    frame = pd.DataFrame({"step": [1, 2, 1, 2], "ap": [1.0, 2.0, 3.0, 4.0], "on": ["test", "test", "b", "b"]})
    (axes,) = figures.chosen(frame, "step", "ap", "on", {"last": (2, 2.0), "other": (1, 1.0), "oracle": (2, 2.0)}).axes
    assert [text.get_text() for text in axes.texts] == ["last\noracle", "other"]
    rings = [line.get_xydata().tolist() for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert rings == [[[2, 2]], [[1, 1]]]


def test_saved_files_are_byte_stable(tmp_path, monkeypatch):
    again = charts()
    for stem, figure in charts().items():
        data = pd.DataFrame({"x": [1 / 3]})
        files = figures.save(figure, tmp_path, stem, data)
        assert [f.suffix for f in files] == [".pdf", ".png", ".csv"]
        before = [f.read_bytes() for f in files]
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        assert [f.read_bytes() for f in figures.save(again[stem], tmp_path, stem, data)] == before
        assert b"CreationDate" not in before[0] and b"/Type3" not in before[0]
        with Image.open(files[1]) as png:
            assert png.info["dpi"][0] == pytest.approx(200, abs=0.1)
    assert (tmp_path / "sheet.csv").read_text() == "x\n0.3333333333\n"


def test_drawing_changes_no_setting_of_the_caller():
    before = dict(matplotlib.rcParams)
    charts()
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context():
        figures.style()
        assert matplotlib.rcParams["pdf.fonttype"] == 42


def test_compare_shows_means_and_reference_in_grey():
    axes = figures.compare(scores()).axes[0]
    means = sorted({round(float(c[0].get_xdata()[0]), 6) for c in axes.containers})
    assert means == [0.55]
    assert axes.containers[0][0].get_color() == "#777777"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["Accuracy ↑", "Pixel AP ↑"]


def test_compare_without_numbers():
    with pytest.raises(ValueError, match="no number to compare"):
        figures.compare(scores().assign(value=np.nan))


def test_intervals_have_a_panel_a_metric_and_the_tables_units():
    rows = [(m, d, w, 0.5, 0.4, 0.7) for m in ("tiny-kid", "tiny-recall") for d in ("crack", "oil") for w in ("a", "b")]
    frame = pd.DataFrame(rows, columns=["metric", "defect", "method", "value", "low", "high"])
    more = frame.assign(value=0.7, low=0.6, high=0.9)
    panels = [axes for axes in figures.intervals(pd.concat([frame, more])).axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["KID ×10³ (tiny) ↓", "Recall (tiny) ↑"]
    for axes, unit in zip(panels, (1000, 1)):
        bars, dots = axes.lines[::2], axes.lines[1::2]
        assert len(bars) == len(dots) == 8, "a bar a seed: the interval of one says nothing of another"
        assert list(bars[0].get_xdata()) == pytest.approx([0.4 * unit, 0.7 * unit])
        assert list(bars[1].get_xdata()) == pytest.approx([0.6 * unit, 0.9 * unit])
        assert len({bar.get_ydata()[0] for bar in bars}) == 8
    with pytest.raises(ValueError, match="no number to show"):
        figures.intervals(frame.assign(value=np.nan))


def test_confusion_counts_and_shapes():
    axes = figures.confusion(np.array([[3, 1], [0, 4]]), ["crack", "stain"]).axes[0]
    assert [t.get_text() for t in axes.texts] == ["3", "1", "0", "4"]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 1]]
    with pytest.raises(ValueError, match="there are 3 labels"):
        figures.confusion(np.eye(2), ["a", "b", "c"])


def test_similarity_is_signed_and_fits_its_labels():
    axes = figures.similarity({"symmetry_aware": np.array([[1, -0.904], [-0.001, 1]])}, ["crack", "stain"]).axes[0]
    assert [t.get_text() for t in axes.texts] == ["+1.00", "-0.90", "+0.00", "+1.00"]
    assert axes.texts[1].get_color() == "white" and axes.images[0].get_clim() == (-1, 1)
    with pytest.raises(ValueError, match="there are 3 labels"):
        figures.similarity({"symmetry_aware": np.eye(2)}, ["a", "b", "c"])


def test_gates_have_a_row_a_method_and_a_line_a_layer():
    panels = figures.gates(gates()).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["background", "interaction", "fusion", "", "", ""]
    for axes in panels:
        *learned, start = axes.lines
        assert len(learned) == 4 and [line.get_ydata()[0] for line in learned] == [1.2] * 4
        assert start.get_linestyle() == "--" and list(start.get_ydata()) == [1, 1]
        assert len({tuple(line.get_color()) for line in learned}) == 2, "a colour a block"


def test_figures_display_themselves():
    png = figures.sheet([[image()]])._repr_png_()
    assert png.startswith(b"\x89PNG")


def test_a_rare_colour_stays_what_it_is():
    """A blue scratch of 60 pixels among pictures of many other colours, in the few colours of a notebook's page."""
    rng = np.random.default_rng(0)
    cells = [torch.from_numpy(rng.uniform(-0.3, 0.3, (3, 64, 64)).astype(np.float32)) for _ in range(8)]
    cells[0][:, 30:32, 10:40] = torch.tensor([-1.0, 0.6, 0.9])[:, None, None]
    with Image.open(io.BytesIO(sheet.png(figures.sheet([cells]), 100, 56))) as picture:
        shown = np.asarray(picture.convert("RGB")).astype(int)
    assert (np.abs(shown - (0, 204, 242)).max(-1) < 40).sum() > 100
