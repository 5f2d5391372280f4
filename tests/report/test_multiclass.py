"""What a symmetry-aware model learned, against numbers worked by hand."""

import numpy as np
import pytest
import torch

from defectlib.methods.symmetry_aware import GROUP, SymmetryAware, SymmetryAwareConfig
from defectlib.report import multiclass


@pytest.fixture
def model(untrained):
    """A model of two classes that has not learned: a test says what it should have."""

    def make(change, **config):
        method = SymmetryAware(SymmetryAwareConfig(rank=4, **config), untrained)
        method.areas = {"hole": (0.1, 0.2), "dent": (0.1, 0.2)}
        state = method.untrained(3).trained_state()
        method.states = {GROUP: {name: change(name, value) for name, value in state.items()}}
        return method

    return make


def test_similarity_is_the_cosine_of_departures(model):
    rows = torch.tensor([[3.0, 0, 0, 0], [4.0, 3.0, 0, 0]])
    found = multiclass.similarity(model(lambda name, v: rows if name.endswith(".departure") else v))
    assert found == pytest.approx(np.array([[1, 0.8], [0.8, 1]]), abs=1e-6)


def test_what_did_not_move_says_so(model):
    assert (multiclass.moved(model(lambda name, v: v), 3)[["moved", "most"]] == 0).all(axis=None)


def test_moves_by_hand(model):
    """Coefficients moved by 0.5, gates to 2 sigmoid(1), bases not at all."""

    def change(name, value):
        return value + 0.5 if name.endswith(".departure") else torch.ones(3) if name.endswith(".offset") else value

    table = multiclass.moved(model(change, compensation=True), 3).set_index("part")
    assert table.loc["coefficients", ["moved", "most"]].tolist() == pytest.approx([0.5, 0.5])
    assert table.loc["coefficients", "start"] == pytest.approx(0.02, rel=0.1)
    gate = 2 / (1 + np.exp(-1)) - 1
    for kind in ("background", "interaction", "fusion"):
        assert table.loc[f"{kind} gate"].tolist() == pytest.approx([1, gate, gate], abs=1e-6)
    assert table.loc["LoRA, A", "moved"] == table.loc["LoRA, B", "start"] == 0
    assert "vectors of VeRA" not in table.index


def test_gates_are_told_in_the_order_of_a_pass(model):
    table = multiclass.gates(model(lambda name, v: v, gates="prior", compensation=True), 3)
    assert list(dict.fromkeys(table["block"])) == ["down 0", "down 1", "middle", "up 1", "up 2"]
    assert list(dict.fromkeys(table["kind"])) == list(multiclass.KINDS)
    first = table[(table["kind"] == "background") & (table["tau"] == 1)]
    assert first["gate"].to_numpy() == pytest.approx(2 / (1 + np.exp(-1))) and (first["gate"] == first["start"]).all()
    assert {".attn1" in layer for layer in table.loc[table["kind"] == "background", "layer"]} == {True}
    assert {".attn1" in layer for layer in table.loc[table["kind"] == "fusion", "layer"]} == {True, False}
    assert set(multiclass.gates(model(lambda name, v: v), 3)["kind"]) == {"interaction", "fusion"}, "no background"
    assert multiclass.gates(model(lambda name, v: v, gates=None), 3).empty


def test_of_vera_vectors_are_told(model):
    parts = multiclass.moved(model(lambda name, v: v, adapters="vera", gates=None), 3)["part"]
    assert list(parts) == ["vectors of VeRA"]


def test_gates_lean_to_the_end_where_they_are_higher(model):
    """The prior has backgrounds early (b = 2), interaction and fusion late (b = -1); what is even leans nowhere."""
    whole = model(lambda name, v: v, gates="prior", compensation=True)
    found = multiclass.leaning(multiclass.gates(whole, 3)).set_index("kind")
    layers = found.loc["background", "layers"]
    assert 0 < found.loc["background", "higher"] == layers < found.loc["fusion", "layers"]
    assert found.loc["interaction", "higher"] == found.loc["fusion", "higher"] == 0
    assert found.loc["fusion", "lower"] == found.loc["fusion", "layers"] and found.loc["background", "lower"] == 0
    assert multiclass.leaning(multiclass.gates(model(lambda name, v: v), 3))[["higher", "lower"]].eq(0).all(None)


def test_what_samples_are_taken_for_is_summed_over_seeds():
    def record(*rows):
        told = [{"metric": "class_seen", "defect": d, "protocol": {"seen_as": seen}} for d, seen in rows]
        return {"metrics": [{"metric": "tiny-kid", "defect": "hole", "protocol": {}}, *told]}

    both = [
        record(("hole", {"hole": 3, "dent": 1}), ("dent", {"hole": 4, "dent": 0})),
        record(("hole", {"hole": 2, "dent": 2})),
    ]
    assert multiclass.taken_for(both, ["hole", "dent"]).tolist() == [[5, 3], [4, 0]]
