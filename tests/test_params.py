import pytest

from defectlib import params, paths, profiles


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"catgory": "nut"}, "catgory: unknown parameter"),
        ({"category": 1}, "category: .*string"),
        ({"seeds": ["0"]}, r"seeds\.0: .*integer"),
        ({"split": "half"}, "split: .*first_third"),
        ({"tiles": "some"}, "^parameters: tiles: 'some' is neither a side of 16 px or more, nor auto, nor none$"),
        ({"tiles": 15}, "tiles: '15' is neither"),
        ({"tiles": True}, "tiles: 'True' is neither"),
    ],
)
def test_wrong_parameters_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        params.validate(values)


def test_read_takes_the_literals_of_a_namespace():
    namespace = {"dataset": "mini", "category": "nut", "params": params, "_i1": "x", "In": [], "Out": {}, "len": len}
    assert params.read(namespace).category == "nut"
    with pytest.raises(ValueError, match="sedes: unknown parameter"):
        params.read({**namespace, "sedes": [1]})


def test_profile_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("DEFECTLIB_PROFILE", raising=False)
    assert params.Parameters().profile_name == "smoke"
    monkeypatch.setenv("DEFECTLIB_PROFILE", "demo")
    assert params.Parameters().profile_name == "demo"
    assert params.Parameters(profile="paper").profile_name == "paper"


def test_the_split_joins_the_folder_name_where_it_is_not_the_profiles_own():
    assert params.Parameters(profile="demo", runs_root="r").dataset_folder().as_posix() == "r/demo/mini"
    other = params.Parameters(profile="demo", runs_root="r", split="all_shots")
    assert other.dataset_folder().as_posix() == "r/demo+all_shots/mini"
    assert other.settings().data.split == "all_shots"


def test_category_files_are_valid_and_named_after_what_they_hold():
    files = [f for f in paths.PARAMS.glob("*/*.yaml") if f.parent.name != "profiles"]
    assert len(files) >= 32
    for file in files:
        loaded = params.load_category(file.parent.name, file.stem)
        assert (loaded.dataset, loaded.category) == (file.parent.name, file.stem), file
        assert loaded.prompts and all(text.strip() for text in loaded.prompts.values()), file


def test_prompts(monkeypatch):
    given = params.Parameters(prompts={"crack": "my crack"})
    assert params.prompt(given, "nut", "crack") == "my crack"
    assert params.prompt(params.Parameters(dataset="folder"), "gear_box", "deep_cut") == "a gear box with a deep cut"
    own = params.Parameters(dataset="mvtec_ad")
    assert params.prompt(own, "bottle", "broken_large") == "A bottle with large broken defects"


def test_variants_are_asked_for_by_name():
    symmetry = profiles.load("symmetry")
    assert params.Parameters(profile="symmetry").settings().variants == symmetry.variants
    assert params.Parameters(profile="symmetry", variants=[]).settings().variants == {}
    two = ["symmetry_aware_no_gates", "symmetry_aware_tied"]
    asked = params.Parameters(profile="symmetry", variants=two)
    assert list(asked.settings().variants) == [name for name in symmetry.variants if name in two], "the profile's order"
    for wrong in ({"variants": ["symmetry_aware_no_gate"]}, {"variants": two, "methods": ["dualanodiff"]}):
        with pytest.raises(ValueError, match="variants: the profile symmetry has no 'symmetry_aware_no_gate"):
            params.Parameters(profile="symmetry", **wrong).settings()
