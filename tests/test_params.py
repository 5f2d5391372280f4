import shutil

import pytest
from pydantic import ValidationError

from defectlib import params, paths


def test_shipped_profiles_are_valid():
    assert {"smoke", "demo", "paper"} <= set(params.profile_names())
    for name in params.profile_names():
        assert params.load_profile(name).profile == name


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


def test_unknown_profile_lists_the_known():
    with pytest.raises(ValueError, match="no profile 'demp'.*demo, multiclass, paper, smoke"):
        params.load_profile("demp")


def test_a_wrong_profile_names_file_and_key(tmp_path, monkeypatch):
    text = (paths.PARAMS / "profiles" / "smoke.yaml").read_text()
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "bad.yaml").write_text(text.replace("learning_rate: 1.0e-3", "learning_rate: 1e-3"))
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    with pytest.raises(ValueError, match=r"bad\.yaml: downstream\.localiser\.learning_rate"):
        params.load_profile("bad")


def test_a_profile_extends_another(tmp_path, monkeypatch):
    demo, symmetry = params.load_profile("demo").model_dump(), params.load_profile("symmetry").model_dump()
    differing = {"profile", "grid", "run", "variants", "quality", "downstream"}
    assert {name for name in demo if demo[name] != symmetry[name]} == differing
    assert symmetry["quality"] == demo["quality"] | {"class_seen": True}, "field by field"
    assert not {"crop_paste_feather", "defectsynth_no_hmi"} & set(symmetry["variants"]), "as a whole"
    folder = tmp_path / "profiles"
    shutil.copytree(paths.PARAMS / "profiles", folder)
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    (folder / "symmetry.yaml").write_text("profile: symmetry\nextends: demp\n")
    with pytest.raises(ValueError, match="no profile 'demp'"):
        params.load_profile("symmetry")
    for name, other in (("symmetry", "multiclass"), ("multiclass", "symmetry")):
        (folder / f"{name}.yaml").write_text(f"profile: {name}\nextends: {other}\n")
    with pytest.raises(ValueError, match="extends itself, by way of symmetry, multiclass"):
        params.load_profile("symmetry")
    (folder / "symmetry.yaml").write_text("profile: demo\nextends: demo\n")
    with pytest.raises(ValueError, match="symmetry.yaml says `profile: demo`"):
        params.load_profile("symmetry")
    (folder / "symmetry.yaml").write_text("profile: symmetry\nextends: demo\nmethods: {shade: {}}\nquality:\n")
    assert params.load_profile("symmetry").methods == demo["methods"] | {"shade": {}}
    (folder / "demo.yaml").write_text((folder / "demo.yaml").read_text().replace("max_normals: 60", "max_normals: -1"))
    with pytest.raises(ValueError, match="demo.yaml.*max_normals"):
        params.load_profile("symmetry")


@pytest.mark.parametrize("rule", [{}, {"of": "first"}, {"most": 2, "others": 3}])
def test_a_rule_for_shots_changes_something(rule):
    with pytest.raises(ValidationError, match="all at once|asks for of"):
        params.ShotRule(**rule)


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


def test_a_variant_is_named_after_its_method():
    values = params.load_yaml(params.paths.PARAMS / "profiles" / "smoke.yaml")
    wrong = values | {"variants": {"without_sae": {"of": "defectsynth", "config": {"sae": False}}}}
    with pytest.raises(ValidationError, match="must be named defectsynth_<what is changed>"):
        params.Profile(**wrong)


def test_another_number_is_drawn_of_methods_that_are_there():
    values = params.load_yaml(params.paths.PARAMS / "profiles" / "smoke.yaml")
    wrong = values | {"sample": values["sample"] | {"n_of": {"dualanodif": 3}}}
    with pytest.raises(ValidationError, match="names 'dualanodif', which is no method of the profile"):
        params.Profile(**wrong)


def test_a_profile_may_hold_more_methods_than_it_runs():
    profile = params.load_profile("symmetry")
    assert profile.asked(None) == ["crop_paste", "dualanodiff", "symmetry_aware"] and "adabldm" in profile.methods
    assert profile.asked(["adabldm"]) == ["adabldm"]
    smoke = params.load_profile("smoke")
    assert smoke.asked(None) == list(smoke.methods)
    with pytest.raises(ValidationError, match="run names 'symetry', which is no method of the profile"):
        params.Profile(**profile.model_dump() | {"run": ["symetry"]})


@pytest.mark.parametrize("name", ["symmetry", "multiclass"])
def test_the_profiles_of_one_model_for_all_differ_from_demo_in_their_methods_alone(name):
    ours, demo = params.load_profile(name), params.load_profile("demo")
    assert ours.quality.class_seen and not demo.quality.class_seen, "asked where one model draws several defects"
    same = {
        "quality": demo.quality.model_copy(update={"class_seen": True}),
        "downstream": demo.downstream.model_copy(update={"curve": ours.downstream.curve, "variants": "all"}),
    }
    demo = demo.model_copy(update=same)
    for part in ("backbone", "data", "sample", "quality", "downstream"):
        assert getattr(ours, part) == getattr(demo, part), part
    for name in set(ours.methods) - {"symmetry_aware"}:
        assert ours.methods[name] == demo.methods[name]
    shared = {k: v for k, v in ours.methods["symmetry_aware"].items() if k != "own_rate"}
    assert shared == ours.methods["dualanodiff"], "equal cost: steps are of a defect"


def test_variants_are_asked_for_by_name():
    symmetry = params.load_profile("symmetry")
    assert params.Parameters(profile="symmetry").settings().variants == symmetry.variants
    assert params.Parameters(profile="symmetry", variants=[]).settings().variants == {}
    two = ["symmetry_aware_no_gates", "symmetry_aware_tied"]
    asked = params.Parameters(profile="symmetry", variants=two)
    assert list(asked.settings().variants) == [name for name in symmetry.variants if name in two], "the profile's order"
    for wrong in ({"variants": ["symmetry_aware_no_gate"]}, {"variants": two, "methods": ["dualanodiff"]}):
        with pytest.raises(ValueError, match="variants: the profile symmetry has no 'symmetry_aware_no_gate"):
            params.Parameters(profile="symmetry", **wrong).settings()
