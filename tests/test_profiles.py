import shutil

import pytest
from pydantic import ValidationError

from defectlib import paths, profiles
from defectlib.report import layout


def test_shipped_profiles_are_valid():
    assert {"smoke", "demo", "paper"} <= set(profiles.names())
    for name in profiles.names():
        assert profiles.load(name).profile == name


def test_every_row_of_every_profile_has_a_title():
    for name in profiles.names():
        shipped = profiles.load(name)
        assert {*shipped.methods, *shipped.variants} <= set(layout.METHOD_TITLES), name


def test_a_profile_tells_the_weights_that_it_needs():
    assert profiles.load("demo").weights() == []
    assert {"inception", "resnet34"} < set(profiles.load("paper").weights())


def test_unknown_profile_lists_the_known():
    with pytest.raises(
        ValueError, match="no profile 'demp'.*demo, longer, multiclass, paper, paper_multiclass, paper_symmetry, smoke"
    ):
        profiles.load("demp")


def test_a_wrong_profile_names_file_and_key(tmp_path, monkeypatch):
    text = (paths.PARAMS / "profiles" / "smoke.yaml").read_text()
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "bad.yaml").write_text(text.replace("learning_rate: 1.0e-3", "learning_rate: 1e-3"))
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    with pytest.raises(ValueError, match=r"bad\.yaml: downstream\.localiser\.learning_rate"):
        profiles.load("bad")


def test_a_profile_extends_another(tmp_path, monkeypatch):
    demo, symmetry = profiles.load("demo").model_dump(), profiles.load("symmetry").model_dump()
    differing = {"profile", "grid", "run", "variants", "quality", "downstream"}
    assert {name for name in demo if demo[name] != symmetry[name]} == differing
    assert symmetry["quality"] == demo["quality"] | {"class_seen": True}, "field by field"
    assert not {"crop_paste_feather", "defectsynth_no_hmi"} & set(symmetry["variants"]), "as a whole"
    folder = tmp_path / "profiles"
    shutil.copytree(paths.PARAMS / "profiles", folder)
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    (folder / "symmetry.yaml").write_text("profile: symmetry\nextends: demp\n")
    with pytest.raises(ValueError, match="no profile 'demp'"):
        profiles.load("symmetry")
    for name, other in (("symmetry", "multiclass"), ("multiclass", "symmetry")):
        (folder / f"{name}.yaml").write_text(f"profile: {name}\nextends: {other}\n")
    with pytest.raises(ValueError, match="extends itself, by way of symmetry, multiclass"):
        profiles.load("symmetry")
    (folder / "symmetry.yaml").write_text("profile: demo\nextends: demo\n")
    with pytest.raises(ValueError, match="symmetry.yaml says `profile: demo`"):
        profiles.load("symmetry")
    (folder / "symmetry.yaml").write_text("profile: symmetry\nextends: demo\nmethods: {shade: {}}\nquality:\n")
    assert profiles.load("symmetry").methods == demo["methods"] | {"shade": {}}
    (folder / "demo.yaml").write_text((folder / "demo.yaml").read_text().replace("max_normals: 60", "max_normals: -1"))
    with pytest.raises(ValueError, match="demo.yaml.*max_normals"):
        profiles.load("symmetry")


@pytest.mark.parametrize("name", ["symmetry", "multiclass"])
def test_at_paper_scale_are_the_same_rows(name):
    """By name and by what they change, but for background compensation, which has its own values there."""
    small, large = (profiles.load(one).variants for one in (name, f"paper_{name}"))
    assert list(small) == list(large)
    assert all(small[n] == large[n] for n in small if "compensated" not in n)
    assert profiles.load(f"paper_{name}").methods == profiles.load("paper").methods


def test_longer_is_demo_with_ten_times_the_steps_for_what_draws_whole_images():
    longer, demo = profiles.load("longer").model_dump(), profiles.load("demo").model_dump()
    assert {name for name in demo if demo[name] != longer[name]} == {
        "profile",
        "run",
        "methods",
        "variants",
        "downstream",
    }
    for name, ours in longer["methods"].items():
        times = 10 if name in ("dualanodiff", "symmetry_aware") else 1
        assert ours == demo["methods"][name] | ({"steps": times * demo["methods"][name]["steps"]} if times > 1 else {})


def test_adapt_names_methods_of_the_profile():
    values = profiles.load("smoke").model_dump()
    values["adapt"]["methods"] = ["dualanodiff", "dualanodif"]
    with pytest.raises(ValidationError, match="adapt.methods names 'dualanodif', which is no method of the profile"):
        profiles.Profile(**values)


@pytest.mark.parametrize("rule", [{}, {"of": "first"}, {"most": 2, "others": 3}])
def test_a_rule_for_shots_changes_something(rule):
    with pytest.raises(ValidationError, match="all at once|asks for of"):
        profiles.ShotRule(**rule)


def test_a_variant_is_named_after_its_method():
    values = profiles.load_yaml(paths.PARAMS / "profiles" / "smoke.yaml")
    wrong = values | {"variants": {"without_sae": {"of": "defectsynth", "config": {"sae": False}}}}
    with pytest.raises(ValidationError, match="must be named defectsynth_<what is changed>"):
        profiles.Profile(**wrong)


def test_another_number_is_drawn_of_methods_that_are_there():
    values = profiles.load_yaml(paths.PARAMS / "profiles" / "smoke.yaml")
    wrong = values | {"sample": values["sample"] | {"n_of": {"dualanodif": 3}}}
    with pytest.raises(ValidationError, match="names 'dualanodif', which is no method of the profile"):
        profiles.Profile(**wrong)


def test_a_profile_may_hold_more_methods_than_it_runs():
    profile = profiles.load("symmetry")
    assert profile.asked(None) == ["crop_paste", "dualanodiff", "symmetry_aware"] and "adabldm" in profile.methods
    assert profile.asked(["adabldm"]) == ["adabldm"]
    smoke = profiles.load("smoke")
    assert smoke.asked(None) == list(smoke.methods)
    with pytest.raises(ValidationError, match="run names 'symetry', which is no method of the profile"):
        profiles.Profile(**profile.model_dump() | {"run": ["symetry"]})


@pytest.mark.parametrize("name", ["symmetry", "multiclass"])
def test_the_profiles_of_one_model_for_all_differ_from_demo_in_their_methods_alone(name):
    ours, demo = profiles.load(name), profiles.load("demo")
    assert ours.quality.class_seen and not demo.quality.class_seen, "asked where one model draws several defects"
    same = {
        "quality": demo.quality.model_copy(update={"class_seen": True}),
        "downstream": demo.downstream.model_copy(update={"curve": ours.downstream.curve, "variants": "all"}),
    }
    demo = demo.model_copy(update=same)
    for part in ("backbone", "adapt", "data", "sample", "quality", "downstream"):
        assert getattr(ours, part) == getattr(demo, part), part
    for name in set(ours.methods) - {"symmetry_aware"}:
        assert ours.methods[name] == demo.methods[name]
    shared = {k: v for k, v in ours.methods["symmetry_aware"].items() if k != "own_rate"}
    assert shared == ours.methods["dualanodiff"], "equal cost: steps are of a defect"
