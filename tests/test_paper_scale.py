"""PROFILE=paper, all nine notebooks, on weights of the real layouts that were never trained: `pytest -m slow`.

Stable Diffusion 1.5 at a quarter of its width, Inception, VGG and ResNet-34 at their own; the code path is the one of
the real files, whose sha256 alone are replaced. What is drawn means nothing.
"""

import hashlib
import json
import shutil

import pytest
import torch
import torchvision
import yaml
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from defectlib import backbone, batch, params, paths, sampling, stages, study
from defectlib.branches.compensation import Compensation
from defectlib.diffusion import sd_scheduler
from defectlib.masks import latent
from defectlib.masks.interpolation import ATTEMPTS, NOT_KEPT, branch
from defectlib.metrics import files
from defectlib.pretrain import parts
from defectlib.report import build

# What is smaller than in the paper's profile; everything else is read from it.
SMALLER = {
    "threads": 1,
    "seeds": [0],
    "methods": {
        "defectsynth": {"steps": 2, "num_inference_steps": 2},
        "dualanodiff": {"steps": 2, "num_inference_steps": 2},
        "symmetry_aware": {"steps": 1, "num_inference_steps": 2},
        "adabldm": {"steps": 2, "composites": 4, "adapt_steps": 1, "num_inference_steps": 2, "decoder_steps": 2},
    },
    "variants": {
        name: {"config": {"num_inference_steps": 2}}
        for name in ("dualanodiff_compensated", "symmetry_aware_compensated")
    },
    "data": {"image_size": 128, "max_normals": 4, "max_test_normals": 2},
    "sample": {"n_per_defect": 4, "n_of": {"dualanodiff": 4, "symmetry_aware": 4, "adabldm": 4}},
    "quality": {"kid_subsets": 2, "seeds": [0]},
    "downstream": {"classifier": {"epochs": None, "steps": 2}, "localiser": {"epochs": None, "steps": 2}},
}
# A model that was never trained draws no mask: the variant that always asks it for one is left out, and the hybrid asks
# it for none because the masks of these defects are small (below tau).
LEFT_OUT = "defectsynth_latent_space"
CATEGORY, DEFECTS = "brick", ["crack", "pinhole"]

# Before a kernel's cells, not at its start: on a busy machine papermill would not wait for a kernel that imports torch.
STARTUP = """
import importlib
from pathlib import PosixPath

def _replace():
    for target, value in {replaced!r}.items():
        module, _, name = target.rpartition(".")
        setattr(importlib.import_module(module), name, value)

get_ipython().events.register("pre_execute", _replace)
"""


def merged(values, changes):
    """``values`` with the leaves of ``changes``."""
    deeper = {k: merged(values[k], v) if isinstance(v, dict) else v for k, v in changes.items()}
    return values | deeper


def smaller_profile(folder):
    """A parameter folder whose paper profile is the shipped one with the values of ``SMALLER``."""
    shutil.copytree(paths.PARAMS, folder)
    file = folder / "profiles" / "paper.yaml"
    profile = merged(yaml.safe_load(file.read_text()), SMALLER)
    del profile["variants"][LEFT_OUT]
    file.write_text(yaml.safe_dump(profile))
    return folder


def stable_diffusion(folder):
    """Stable Diffusion 1.5's files as released, a quarter as wide (groups as wide as there); sha256 of its weights."""
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(80, 160, 320, 320), cross_attention_dim=192, norm_num_groups=8
    )
    tokenizer = parts.new_tokenizer()
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=768, num_hidden_layers=12, num_attention_heads=3,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, PNDMScheduler.from_config(sd_scheduler().config, skip_prk_steps=True),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    # The release names a safety checker, which is not fetched, and has its tokenizer in two files.
    index = json.loads((folder / "model_index.json").read_text()) | {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    words = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(words["vocab"]))
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in words["merges"])])
    (folder / "tokenizer" / "merges.txt").write_text(merges)
    special = {f"{name}_token": "<|endoftext|>" for name in ("eos", "pad", "unk")} | {"bos_token": "<|startoftext|>"}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(about))
    return {file: paths.sha256(folder / file) for file in backbone.WEIGHT_FILES}


def other_weights(folder, monkeypatch):
    """Inception, VGG and ResNet-34 as their files would be; the names that carry their digests."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            pass

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
    vgg = torchvision.models.vgg16(weights=None, init_weights=False).features.state_dict()
    states = {
        "inception": Blank("blank", ["2048", "logits_unbiased"]).state_dict(),
        "vgg": {f"features.{name}": value for name, value in vgg.items()},
        "resnet34": torchvision.models.resnet34(weights=None).state_dict(),
    }
    folder.mkdir()
    named = dict(files.FILES)
    for name, state in states.items():
        torch.save(state, folder / "x.pth")
        file = f"{name}-{hashlib.sha256((folder / 'x.pth').read_bytes()).hexdigest()[:8]}.pth"
        (folder / "x.pth").rename(folder / file)
        named[name] = (file, "")
    return named


@pytest.fixture
def untrained_paper(tmp_path, monkeypatch):
    """The smaller profile and untrained weights in place of the paper's, for this process and for every kernel."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        digests, named = stable_diffusion(tmp_path / "sd15"), other_weights(tmp_path / "weights", monkeypatch)
    known = json.loads((backbone.HERE / "known.json").read_text())
    (tmp_path / "known.json").write_text(json.dumps(merged(known, {"sd15": {"sha256": digests}})))
    replaced = {
        "defectlib.paths.PARAMS": smaller_profile(tmp_path / "papermill_params"),
        "defectlib.paths.WEIGHTS": tmp_path / "weights",
        "defectlib.backbone.HERE": tmp_path,
        "defectlib.metrics.files.FILES": named,
    }
    for target, value in replaced.items():
        monkeypatch.setattr(target, value)
    startup = tmp_path / "ipython" / "profile_default" / "startup" / "untrained.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(STARTUP.format(replaced=replaced))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("DEFECTLIB_SD15", str(tmp_path / "sd15"))
    backbone.known.cache_clear()
    yield
    backbone.known.cache_clear()


@pytest.mark.slow
def test_all_notebooks_at_paper_scale(untrained_paper, tiny_mini, tmp_path):
    given = params.validate({
        "profile": "paper", "data_root": str(tiny_mini), "defects": DEFECTS, "runs_root": str(tmp_path / "runs"),
    })  # fmt: skip
    settings = given.settings()
    assert (settings.backbone, settings.quality.extractor, settings.quality.perceptual) == ("sd15", "inception", "vgg")
    assert settings.downstream.classifier.pretrained and settings.sample.mask_source == "hmi"
    study.require_weights(given)
    graph = batch.jobs(given, [CATEGORY])
    for job in graph.values():
        batch.run_job(job)
    assert {job.notebook for job in graph.values()} == set(batch.NOTEBOOKS)
    fit = study.open_category(given.model_copy(update={"category": CATEGORY})).folder("defectsynth", 0).record("fit")
    assert fit["parameters"]["config"]["steps"] == 2
    assert fit["parameters"]["backbone"] == {"sd15": backbone.digest("sd15")}
    found = study.results(given, [CATEGORY])
    scored = found[(found["method"] == "defectsynth") & found["value"].notna()]
    assert {"inception-kid", "vgg-ic-lpips", "accuracy", "pixel_ap"} <= set(scored["metric"])
    values = {"parameters": given.model_dump(exclude_none=True), "categories": [CATEGORY], "grouping": "category"}
    assert build.report(values).is_file()


@pytest.mark.slow
def test_latent_space_is_asked_for_masks_at_paper_scale(untrained_paper, tiny_mini, tmp_path):
    """Which is not above, where masks are small; a model that was never trained gives none, and that is counted."""
    given = params.validate({
        "profile": "paper", "data_root": str(tiny_mini), "category": CATEGORY, "defects": ["efflorescence"],
        "methods": ["defectsynth"], "runs_root": str(tmp_path / "runs"),
    })  # fmt: skip
    s = study.open_category(given)
    assert branch([shot.mask for shot in s.shots(0)]) == "latent"
    record = stages.sample(s, "defectsynth", 0)
    (refused,) = [row["protocol"]["reasons"] for row in record["metrics"] if row["metric"] == "masks_refused"]
    assert (
        refused[latent.FELL_BACK]
        == s.n_per_defect("defectsynth")
        == len(sampling.load(s.folder("defectsynth", 0).path))
    )
    assert refused.get(latent.BLACK, 0) + refused.get(NOT_KEPT, 0) >= ATTEMPTS * refused[latent.FELL_BACK]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dualanodiff_compensated", "symmetry_aware_compensated"])
def test_a_background_is_compensated_at_paper_scale(untrained_paper, tiny_mini, tmp_path, name):
    """Which is left out above: the surface of a brick fills the frame."""
    given = params.validate({
        "profile": "paper", "data_root": str(tiny_mini), "category": "gear", "defects": ["crack"],
        "methods": [name.removesuffix("_compensated")], "runs_root": str(tmp_path / "runs"),
    })  # fmt: skip
    s = study.open_category(given)
    assert name in s.variants
    stages.sample(s, name, 0)
    assert len(list((s.folder(name, 0).path / "images").glob("*.png"))) == s.n_per_defect(name)
    (state,) = s.load(name, 0).states.values()
    strengths = torch.stack([value for key, value in state.items() if key.endswith(".gamma")])
    assert len(strengths) == 16, "one a self-attention of the UNet"
    assert (strengths != Compensation.GAMMA).any(), "learned from there"
