import pytest

from defectlib import params, paths, prepare
from defectlib.data import mini


def given(tmp_path, **values):
    return params.validate({"profile": "smoke", "runs_root": str(tmp_path / "runs"), **values})


def test_a_misspelt_data_set_is_named_before_its_folder(tmp_path):
    with pytest.raises(ValueError, match="no data set 'mvtek_ad'; known: mini, mvtec_ad, "):
        prepare.data_root(given(tmp_path, dataset="mvtek_ad"))


def test_a_folder_in_another_layout_is_told_the_expected_one(tmp_path):
    root = tmp_path / "my parts"
    (root / "good").mkdir(parents=True)
    with pytest.raises(ValueError) as caught:
        prepare.manifest(given(tmp_path, dataset="folder", data_root=str(root)))
    message = str(caught.value)
    assert "nothing in this layout. It should hold <category>/train/good, <category>/test/<defect> and" in message
    assert "<category>/ground_truth/<defect>" in message
    assert message.endswith(f"--dataset folder --data-root '{root}')"), "the command can be pasted"


def test_the_first_start_says_that_mini_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    monkeypatch.setattr(mini, "build", lambda root: root)
    assert prepare.data_root(given(tmp_path)) == tmp_path / "mini"
    assert capsys.readouterr().err == f"drawing mini into {tmp_path / 'mini'} (once)\n"
    (tmp_path / "mini").mkdir()
    prepare.data_root(given(tmp_path))
    assert capsys.readouterr().err == ""
