import dataclasses
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from defectlib import adaptation, backbone, images, params, paths, profiles, stages, study
from defectlib.masks import trimap


def test_a_variant_has_a_fit_of_its_own_where_the_fit_differs(tiny_parameters):
    s = study.open_category(tiny_parameters)
    variants = s.settings.variants | {"defectsynth_longer": profiles.Variant(of="defectsynth", config={"steps": 3})}
    s = dataclasses.replace(s, settings=s.settings.model_copy(update={"variants": variants}))
    assert s.fitted_as("defectsynth_no_sae") == "defectsynth" and not s.config("defectsynth_no_sae").sae
    assert s.fitted_as("defectsynth_longer") == "defectsynth_longer"
    released = s.config("defectsynth_as_released")
    assert (released.eta, released.sae_form) == (1.0, "released")
    assert released.num_inference_steps == 2, "what the profile sets stays"
    assert s.mask_source_name("defectsynth_perlin") == "perlin" and s.mask_source_name("defectsynth_no_sae") == "hmi"


def test_every_part_of_the_symmetry_aware_system_is_fitted_anew_and_drawing_is_not(tiny_parameters):
    s = study.open_category(tiny_parameters.model_copy(update={"profile": "symmetry"}))
    assert s.methods == ("crop_paste", "dualanodiff", "symmetry_aware") and len(s.variants) >= 7
    assert all(s.fitted_as(name) == name for name in s.variants)
    drawn = profiles.Variant(of="symmetry_aware", config={"guidance_scale": 1.5, "num_inference_steps": 5})
    variants = s.settings.variants | {"symmetry_aware_quick": drawn}
    s = dataclasses.replace(s, settings=s.settings.model_copy(update={"variants": variants}))
    assert s.fitted_as("symmetry_aware_quick") == "symmetry_aware"


def test_a_variant_learns_from_fewer_shots(tiny_parameters):
    s = study.open_category(tiny_parameters)
    few = {
        "crop_paste_one": profiles.Variant(of="crop_paste", shots=profiles.ShotRule(most=1)),
        "crop_paste_unequal": profiles.Variant(of="crop_paste", shots=profiles.ShotRule(most=1, of="first")),
        "crop_paste_capped": profiles.Variant(of="crop_paste", shots=profiles.ShotRule(most=1, of="first", others=2)),
    }
    s = dataclasses.replace(s, settings=s.settings.model_copy(update={"variants": few}), variants=tuple(few))
    every = [(shot.defect, shot.id) for shot in s.shots(0)]
    one, unequal, capped = ([(shot.defect, shot.id) for shot in s.learned(name, 0)] for name in few)
    firsts = [next(item for item in every if item[0] == defect) for defect in s.defects]
    assert one == firsts and len(every) > len(unequal) > len(one)
    assert unequal == [firsts[0], *(item for item in every if item[0] != s.defects[0])]
    assert Counter(defect for defect, _ in capped) == {s.defects[0]: 1} | dict.fromkeys(s.defects[1:], 2)
    assert [s.fitted_as(name) for name in few] == list(few), "each is fitted by itself"
    assert len(s.learned("crop_paste", 0)) == len(every)
    keys = {name: stages.sample(s, name, 0)["key"] for name in ["crop_paste", *few]}
    assert len(set(keys.values())) == 4
    assert [len(s.load(name, 0).shots) for name in few] == [len(one), len(unequal), len(capped)], "and no others"


def test_what_draws_whole_images_starts_from_a_base_adapted_to_the_normals(tiny_parameters, monkeypatch):
    s = study.open_category(tiny_parameters)
    plain, adapted = s.backbone("defectsynth", 0), s.backbone("dualanodiff", 0)
    assert plain.digest == backbone.digest("tiny") != adapted.digest
    monkeypatch.setattr(adaptation, "fit", lambda *a, **k: pytest.fail("it was trained again"))
    assert s.backbone("symmetry_aware", 1).digest == adapted.digest, "one for all methods and seeds on these normals"
    assert s.backbone("dualanodiff_no_interaction", 0).digest == adapted.digest
    monkeypatch.undo()
    every = s.backbone("symmetry_aware_all_categories", 0)
    assert every.digest != adapted.digest, "one fit of all categories, one base of all their normals"
    other = study.open_category(tiny_parameters.model_copy(update={"category": "gear"}))
    assert other.category != s.category
    assert other.backbone("symmetry_aware_all_categories", 0).digest == every.digest
    assert other.backbone("symmetry_aware", 0).digest != adapted.digest


def test_another_adaptation_is_another_fit(tiny_parameters):
    s = study.open_category(tiny_parameters)
    first, crop = stages.fit(s, "dualanodiff", 0), stages.fit(s, "crop_paste", 0)
    settings = s.settings.model_copy(update={"adapt": None})
    s = dataclasses.replace(s, settings=settings)
    assert stages.fit(s, "dualanodiff", 0)["key"] != first["key"]
    assert stages.fit(s, "crop_paste", 0)["key"] == crop["key"]
    assert s.load("dualanodiff", 0).backbone.digest == backbone.digest("tiny")


def test_a_variant_learns_the_last_defect_later(tiny_parameters, tmp_path, monkeypatch):
    late = {"symmetry_aware_later": profiles.Variant(of="symmetry_aware", shots=profiles.ShotRule(last_later=True))}
    order = study.open_category(tiny_parameters).defects[::-1]  # as asked for, whatever the order of the files
    asked = tiny_parameters.model_copy(update={"methods": ["symmetry_aware"], "defects": list(order)})
    settings = asked.settings().model_copy(update={"variants": late})
    monkeypatch.setattr(params.Parameters, "settings", lambda self: settings)
    s = study.open_category(asked)
    assert s.variants == ("symmetry_aware_later",) and len(s.defects) == 2
    stages.fit(s, "symmetry_aware_later", 0)
    both = s.load("symmetry_aware_later", 0)
    assert tuple(both.areas) == s.defects
    alone = study.open_category(asked.model_copy(update={"defects": [s.defects[0]]}))
    assert alone.variants == (), "there is no other defect to learn before it"
    before = alone.method_of("symmetry_aware")(alone.config("symmetry_aware"), alone.backbone("symmetry_aware", 0))
    before.fit(alone.shots(0), alone.normals(0), prompts=alone.prompts(), seed=0, workdir=tmp_path / "before")
    first, then = (method.states["all"] for method in (before, both))
    assert all(torch.equal(value, then[name][: len(value)]) for name, value in first.items()), "it is left as it was"
    settings.variants["crop_paste_later"] = late["symmetry_aware_later"].model_copy(update={"of": "crop_paste"})
    with pytest.raises(
        ValueError, match="crop_paste_later learns a defect later, for which a method needs coefficients"
    ):
        study.open_category(asked.model_copy(update={"methods": ["crop_paste"]}))


def test_hmi_needs_two_shots_of_a_variant_too(tiny_parameters, monkeypatch):
    settings = profiles.load("smoke")
    lone = profiles.Variant(of="defectsynth", shots=profiles.ShotRule(most=1))
    changed = settings.model_copy(update={"variants": {"defectsynth_one_shot": lone}})
    monkeypatch.setattr(params.Parameters, "settings", lambda self: changed)
    with pytest.raises(ValueError, match="defectsynth_one_shot learns from one shot, and its mask source 'hmi"):
        study.open_category(tiny_parameters.model_copy(update={"methods": ["defectsynth"]}))


def test_a_mask_over_the_whole_image_stops_a_study_of_pair_methods(tiny_parameters, monkeypatch):
    s = study.open_category(tiny_parameters)
    full = dataclasses.replace(s.shots()[0], mask=torch.ones_like(s.shots()[0].mask))
    monkeypatch.setattr(study.Study, "shots", lambda self, seed=0: [full])
    with pytest.raises(ValueError, match=f"{full.defect}/{full.id} covers the whole image, and dualanodiff could read"):
        study.open_category(tiny_parameters)
    study.open_category(tiny_parameters.model_copy(update={"methods": ["crop_paste"]}))


def test_weights_are_asked_for_before_any_work(tiny_parameters, tmp_path, monkeypatch):
    study.require_weights(tiny_parameters)
    monkeypatch.setattr(paths, "WEIGHTS", tmp_path)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("defectlib.backbone.folder_of", lambda name: tmp_path / name)
    with pytest.raises(FileNotFoundError, match="'sd15': .* run `hf download") as caught:
        study.require_weights(tiny_parameters.model_copy(update={"profile": "paper"}))
    told = str(caught.value).split("\n")[1:]  # all that is missing, not only the first
    wanted = [f"get them by: python -m defectlib.metrics.files {name} " for name in ("inception", "resnet34", "vgg")]
    assert [name in line for name, line in zip(wanted, told, strict=True)] == [True] * 3
    with pytest.raises(FileNotFoundError, match="bring back what was shipped: `git checkout -- "):
        study.require_weights(tiny_parameters.model_copy(update={"methods": ["defectsynth"]}))


def test_no_test_image_is_a_shot(tiny_parameters):
    s = study.open_category(tiny_parameters)
    shots = {(shot.defect, shot.id) for shot in s.shots()}
    held_out = {(defect, name) for _, _, defect, name in s.held_out()}
    assert shots and held_out and not shots & held_out


def test_damaged_data_stop_a_study_before_any_work(tiny_parameters, tiny_mini, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(tiny_mini, root)
    victim = next(root.glob("*/test/*/000.png"))
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"would spoil a run: .*000\.png.*python -m defectlib audit"):
        study.open_category(tiny_parameters.model_copy(update={"data_root": str(root)}))
    assert not (tmp_path / "runs" / "smoke" / "mini" / "split_p0.csv").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": "spoon"}, "no category 'spoon' with shots; it has: "),
        ({"defects": ["melted"]}, "has no defect melted with shots; it has: "),
        ({"methods": ["cut_paste"]}, "no method 'cut_paste'"),
    ],
)
def test_unknown_names_list_the_known(tiny_parameters, change, message):
    with pytest.raises(ValueError, match=message):
        study.open_category(tiny_parameters.model_copy(update=change))


def test_a_missing_data_root_says_how_to_get_it(tiny_parameters):
    asked = tiny_parameters.model_copy(update={"dataset": "mvtec_ad", "data_root": "nowhere"})
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder.*mvtec.com"):
        study.open_category(asked)


def test_notebooks_draw_beside_the_runs(tiny_parameters):
    own = tiny_parameters.model_copy(update={"profile": "demo", "data_root": None, "runs_root": None})
    assert own.figures_folder() == paths.RUNS / "demo" / "mini" / "figures"
    assert own.model_copy(update={"figures_root": "x"}).figures_folder().as_posix() == "x"


def test_results_are_those_that_are_asked_for(tiny_parameters):
    first, second = (f"c{i}" for i in range(2))
    s = study.open_category(tiny_parameters)
    record = stages.fit(s, "crop_paste", 0)
    for category, method, seed in ((first, "crop_paste", 0), (second, "crop_paste", 0), (first, "crop_paste", 7),
                                   (first, "other", 0), (first, study.SHOTS_ONLY, 0)):  # fmt: skip
        folder = tiny_parameters.dataset_folder() / category / method / f"s{seed}"
        paths.write_text(
            folder / "fit.json", json.dumps(record | {"category": category, "method": method, "seed": seed})
        )

    def runs_of(categories, **more):
        found = study.results(tiny_parameters.model_copy(update=more), categories)
        return sorted(zip(found["category"], found["method"], found["seed"]))

    assert runs_of([first]) == [("c0", "crop_paste", 0), ("c0", "shots_only", 0)]
    assert ("c1", "crop_paste", 0) in runs_of([first, second])
    assert runs_of([first], seeds=[7]) == [("c0", "crop_paste", 7)]
    assert runs_of([first], methods=["dualanodiff"], variants=[]) == runs_of([first]), "and what all are compared with"
    only = study.open_category(tiny_parameters.model_copy(update={"methods": ["dualanodiff"], "variants": []}))
    assert only.compared() == only.learned_with() == [study.SHOTS_ONLY, "crop_paste", "dualanodiff"]


def test_ic_lpips_clusters_around_the_first_third_whatever_the_split(tiny_parameters):
    ids = []
    for split in ("first_third", "all_shots"):
        s = study.open_category(tiny_parameters.model_copy(update={"split": split}))
        shots = [shot for shot in s.shots() if shot.defect == s.defects[0]]
        references = s.references(s.defects[0])
        ids.append([next(x.id for x in shots if torch.equal(x.image, image)) for image in references])
    assert ids[0] == ids[1] and len(shots) > len(ids[1]) > 0


def test_random_thirds_has_a_partition_a_seed(tiny_parameters):
    s = study.open_category(tiny_parameters.model_copy(update={"split": "random_thirds"}))
    sides = [s.manifest(seed).set_index(["defect", "id"])["side"] for seed in (0, 1)]
    assert not sides[0].sort_index().equals(sides[1].sort_index())


def test_a_variant_for_objects_is_left_out_where_the_surface_fills_the_frame(tiny_parameters):
    """Background compensation needs a background: gear has one, brick has none."""
    for category, has in (("gear", True), ("brick", False)):
        s = study.open_category(tiny_parameters.model_copy(update={"category": category}))
        assert ("dualanodiff_compensated" in s.variants) is has and "dualanodiff_no_interaction" in s.variants


def test_a_method_may_be_drawn_another_number_of_times(tiny_parameters, monkeypatch):
    s = study.open_category(tiny_parameters)
    asked = s.settings.sample.model_copy(update={"n_of": {"dualanodiff": 3}})
    other = dataclasses.replace(s, settings=s.settings.model_copy(update={"sample": asked}))
    assert other.n_per_defect("dualanodiff") == other.n_per_defect("dualanodiff_no_interaction") == 3
    assert other.n_per_defect("crop_paste") == s.n_per_defect("dualanodiff") == s.settings.sample.n_per_defect


def test_objects_of_which_one_normal_shows_no_background_have_no_variant_that_needs_it(tiny_parameters, monkeypatch):
    gear = tiny_parameters.model_copy(update={"category": "gear"})
    assert "dualanodiff_compensated" in study.open_category(gear).variants
    monkeypatch.setattr(study, "_objects", {})
    real, noise = study.Study.normals, torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(study.Study, "normals", lambda s, seed=0: [*real(s, seed), noise])
    assert "dualanodiff_compensated" not in study.open_category(gear).variants


def test_a_method_has_its_masks_from_where_its_paper_has_them(tiny_parameters):
    s = study.open_category(tiny_parameters.model_copy(update={"category": "gear"}))
    assert s.mask_source_name("adabldm") == s.mask_source_name("adabldm_as_released") == "affine"
    assert s.mask_source_name("adabldm_as_shots") == "affine_as_shots"
    assert s.mask_source_name("defectsynth") == s.settings.sample.mask_source == "hmi"
    values = s.settings.model_dump()
    values["sample"]["mask_source_of"] = {"adabdm": "affine"}
    with pytest.raises(ValueError, match="sample.mask_source_of names 'adabdm', which is no method of the profile"):
        profiles.Profile(**values)


@pytest.fixture
def painted(tiny_parameters, tmp_path):
    """A gear study whose user paints the left half of every image as object."""
    s = study.open_category(tiny_parameters.model_copy(update={"category": "gear"}))
    half = torch.zeros(1, 64, 64, dtype=torch.bool)
    half[..., :32] = True
    for image in s.learned_from(0):
        images.write_mask((tmp_path / "objects" / image).with_suffix(".png"), half)
    return s, half, s.parameters.model_copy(update={"foregrounds": str(tmp_path / "objects")})


def test_the_users_own_foregrounds_stand_before_what_is_found(painted):
    s, half, asked = painted
    normal = s.normals()[0]
    assert not torch.equal(trimap.foreground(normal), half)
    own = study.open_category(asked)
    assert torch.equal(trimap.foreground(own.normals()[0]), half)
    assert all(torch.equal(trimap.foreground(shot.image), half) for shot in own.shots())
    assert own.data_key(0) != s.data_key(0), "another foreground is another run"
    again = study.open_category(s.parameters)
    assert not torch.equal(trimap.foreground(again.normals()[0]), half), "a study without the folder finds by itself"
    own.normals()
    mask = own.mask_source("adabldm")(np.random.default_rng(0), own.shots(), own.normals()[0])
    assert mask.any() and (mask <= half).all()


def test_a_folder_of_foregrounds_is_checked_before_any_work(painted):
    s, half, asked = painted
    file = study.open_category(asked).foreground_file(s.learned_from(0)[0])
    file.unlink()
    with pytest.raises(ValueError, match=rf"foregrounds: {file} is missing; the folder must hold a mask"):
        study.open_category(asked)
    images.write_mask(file, half[..., :40])
    with pytest.raises(ValueError, match="is 40 x 64 px, its image 64 x 64"):
        study.open_category(asked)
    images.write_mask(file, ~half & half)
    with pytest.raises(ValueError, match="is all black: paint the object white"):
        study.open_category(asked)


def test_a_tile_beside_the_object_is_named(painted):
    s, half, asked = painted
    corner = torch.zeros_like(half)
    corner[..., :2, :2] = True
    for image in s.learned_from(0):
        images.write_mask(study.open_category(asked).foreground_file(image), corner)
    with pytest.raises(ValueError, match=r"foregrounds: .*png shows no object in the tile .*: set tiles to none"):
        s = study.open_category(asked.model_copy(update={"tiles": 32}))
        s.shots()
        s.normals()
