import pytest

from defectlib import batch, cli


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_doctor_says_how_to_get_what_is_missing(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for part in ("Machine", "Packages", "Profiles", "Weights", "Data sets", "torch ", "mini", "inception"):
        assert part in out
    assert "mvtec.com" in out and "make reproduce DATASET=folder" in out


def test_audit_ends_with_one_where_a_run_would_be_spoiled(capsys, tiny_mini, tmp_path):
    import shutil

    assert run(capsys, "audit", "--data-root", str(tiny_mini))[0] == 0
    root = tmp_path / "copy"
    shutil.copytree(tiny_mini, root)
    next(root.glob("*/train/good/*.png")).write_bytes(b"")
    code, out, _ = run(capsys, "audit", "--data-root", str(root))
    assert code == 1 and "zero" in out


def test_claimed_variants_are_those_that_the_papers_compare(capsys, monkeypatch, tiny_mini, tmp_path):
    asked = {}
    monkeypatch.setattr(batch, "reproduce", lambda values, words: asked.update(values["parameters"]))
    words = ("reproduce", "--data-root", str(tiny_mini), "--runs", str(tmp_path), "--variants", "claimed")
    assert run(capsys, *words)[0] == 0
    compared = {f"defectsynth_{x}" for x in ("no_hmi", "no_sff", "no_sae", "perlin", "image_space", "latent_space")}
    compared |= {"dualanodiff_no_interaction", "dualanodiff_compensated"}
    assert set(asked["variants"]) == compared
    assert run(capsys, *words, "--methods", "crop_paste")[0] == 0 and asked["variants"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report", "--dataset", "gdxray", "--runs", "nowhere"), "nothing was run for this data set yet"),
        (("reproduce", "--profile", "demp"), "there is no profile 'demp'"),
        (("reproduce", "--profile", "smoke", "--dataset", "mvtec_ad", "--data-root", "nowhere"), "is not a folder"),
        (("reproduce", "--profile", "smoke", "--tiles", "many"), "tiles"),
        (("reproduce", "--profile", "smoke", "--methods", "cut_paste"), "no method 'cut_paste'"),
        (("reproduce", "--tiles", "8"), "tiles: '8' is neither a side of 16 px or more, nor auto, nor none"),
        (("reproduce", "--methods", ","), "--methods: ',' names nothing"),
        (("reproduce", "--category", " , "), "--category: ' , ' names nothing"),
        (("reproduce", "--seeds", "0,a"), "--seeds: 'a' is not a whole number from 0 up"),
        (("reproduce", "--cores", "0"), "--cores: '0' is not a whole number from 1 up"),
        (("reproduce", "--split", "half"), "--split: invalid choice: 'half'"),
        (("reproduce", "--workflow-profile", "slrum"), "--workflow-profile: invalid choice: 'slrum'"),
        (("reproduce", "--dataset", "mvtek_ad"), "there is no data set 'mvtek_ad'; known: mini, mvtec_ad"),
        (("notebooks", "01_data", "07_qualty"), "there is no notebook '07_qualty'; there are: 01_data, "),
        (("reprodcue",), "invalid choice: 'reprodcue'"),
        (("audit", "--dataset", "mvtec", "--data-root", "."), "there is no data set 'mvtec'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, words, message):
    code, _, err = run(capsys, *words)
    assert code == 2 and message in err and err.startswith("defectlib: ") and err.count("\n") == 1
