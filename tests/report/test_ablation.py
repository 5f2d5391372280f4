import pandas as pd
import pytest

from defectlib.metrics import regions
from defectlib.report import ablation, formats, layout, page

PART = "dualanodiff_no_interaction"


def results(*rows):
    """Rows of method, seed, defect, metric, value on mini's gear."""
    frame = pd.DataFrame(rows, columns=["method", "seed", "defect", "metric", "value"])
    return frame.assign(profile="symmetry", split="first_third", dataset="mini", category="gear", dirty=False)


@pytest.fixture
def table():
    return ablation.build(results(
        (PART, 0, "crack", "tiny-kid", 0.2), (PART, 1, "crack", "tiny-kid", 0.4),
        ("symmetry_aware", 0, "crack", "tiny-kid", 0.7), ("symmetry_aware", 1, "crack", "tiny-kid", 0.7),
        ("dualanodiff", 0, "crack", "tiny-kid", 0.1), ("dualanodiff", 0, "dent", "tiny-kid", 0.3),
        ("dualanodiff", 1, "crack", "tiny-kid", 0.5), ("dualanodiff", 1, "dent", "tiny-kid", None),
        (PART, 0, "crack", "mask_seen", None), (PART, 1, "crack", "mask_seen", 0.25),
        ("dualanodiff", 0, "crack", "mask_seen", None), ("dualanodiff", 1, "crack", "mask_seen", 0.0),
        ("dualanodiff", 0, "dent", "mask_seen", 0.5), ("dualanodiff", 1, "dent", "mask_seen", 0.7),
        ("dualanodiff", 0, "", "accuracy", 0.5), ("dualanodiff", 1, "", "accuracy", 0.75),
        ("shots_only", 0, "", "accuracy", 0.5), ("shots_only", 1, "", "accuracy", 0.5),
        ("dualanodiff", 0, "crack", "accuracy" + regions.BY_DEFECT, 0.9),
        ("dualanodiff", 0, "", "accuracy" + regions.ORACLE, 0.9),
    ))  # fmt: skip


def test_means_over_defects_then_seeds(table):
    own = table.set_index(["method", "metric"])[["reproduced", "sd", "n"]]
    assert own.loc[("dualanodiff", "tiny-kid")].tolist() == pytest.approx([300, 282.843, 2], abs=1e-3)
    assert own.loc[("dualanodiff", "mask_seen"), "reproduced"] == pytest.approx(0.6), "of what is known for every seed"
    assert own.loc[(PART, "mask_seen")].tolist()[::2] == [0.25, 1], "what is withheld is no zero"
    assert own.loc[("dualanodiff", "accuracy"), "reproduced"] == 62.5, "of all defects, at the last step"
    assert len(own) == 7


def test_variants_stand_below_their_method(table):
    (block,) = layout.blocks(table)
    assert block.title == "mini, gear: 2 seeds"
    assert list(block.cells) == ["Method", "KID ×10³ (tiny) ↓", "Accuracy, % ↑", "Mask on defect, IoU ↑"]
    assert block.cells.values.tolist() == [
        ["w/o augmentation", "", "50.0 ± 0.0", ""], ["DualAnoDiff", "300.0 ± 282.8", "62.5 ± 17.7", "0.60 ± 0.14"],
        ["DualAnoDiff w/o SAIM", "300.0 ± 141.4", "", "0.25 (1)"], ["Symmetry-aware", "700.0 ± 0.0", "", ""],
    ]  # fmt: skip


def test_in_all_formats_and_on_the_page(table, tmp_path):
    assert "| DualAnoDiff | 300.0 ± 282.8 | 62.5 ± 17.7 | 0.60 ± 0.14 |" in formats.markdown(table)
    assert formats.latex(table).count(r"\begin{table}") == 1
    text = page.write_page(tmp_path, {}, pd.DataFrame(columns=["value"]), {}, others=[table]).read_text()
    assert 'href="#ablation"' in text and "<td>300.0 ± 282.8</td>" in text.replace('<td class="n">', "<td>")


def test_of_nothing_and_of_two_profiles():
    assert ablation.build(results()).empty and layout.blocks(ablation.build(results())) == []
    both = results((PART, 0, "crack", "tiny-kid", 0.2), (PART, 1, "crack", "tiny-kid", 0.4))
    with pytest.raises(ValueError, match="mix the profiles demo, symmetry"):
        ablation.build(both.assign(profile=["demo", "symmetry"]))
