"""That the small base model does not know ``mini``: what is left for the shots to teach, in two numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from defectlib import downstream, profiles, sampling
from defectlib.backbone import Backbone
from defectlib.data import mini, world
from defectlib.images import resize_image, resize_mask
from defectlib.masks.sources import SOURCES
from defectlib.methods import base as methods
from defectlib.metrics import regions
from defectlib.types import Shot

DEFECTS, SHOTS, TEST, NORMALS, SAMPLES = 2, 8, 12, 24, 24
DRAWS = 200
PROFILE = "demo"
ZERO_SHOT = {"steps": 0, "guidance_scale": 3.0, "sae": False, "sff": False}


def _pictures(category: str, kind: str, indices: range) -> list[tuple[Tensor, Tensor]]:
    drawn = [mini.draw(category, kind, i) for i in indices]
    return [(resize_image(image, world.SIZE), resize_mask(mask, world.SIZE)) for image, mask in drawn]


def localisation(model: Backbone, folder: Path, seed: int = 0) -> pd.DataFrame:
    """Pixel AP on real defects of ``mini`` of a localiser that was trained on zero-shot samples, and on what else.

    Zero-shot: inside a moved real mask on a normal image, the base model draws from the defect's prompt with
    classifier-free guidance; it has seen no shot. All rows are trained by the ``demo`` profile's protocol.

    Returns:
        A row a category: zero-shot samples, the shots alone, Crop-Paste samples, and chance (the share of defect
        pixels, the AP of a map that says nothing).
    """
    settings, rows = profiles.load(PROFILE).downstream.localiser, []
    for category, every in mini.CATEGORIES.items():
        defects = every[:DEFECTS]
        shots = [
            Shot(image, mask, category, d, f"{i:03d}")
            for d in defects for i, (image, mask) in enumerate(_pictures(category, f"test/{d}", range(SHOTS)))
        ]  # fmt: skip
        normals = [image for image, _ in _pictures(category, "train/good", range(NORMALS))]
        test = [pair for d in defects for pair in _pictures(category, f"test/{d}", range(SHOTS, SHOTS + TEST))]
        test += _pictures(category, "test/good", range(TEST))
        images, truth = (torch.stack(part) for part in zip(*test))
        prompts, trained_on = mini.PROMPTS[category], {"shots alone": shots}
        for name, method, values in (("zero-shot", "defectsynth", ZERO_SHOT), ("Crop-Paste", "crop_paste", {})):
            generator = methods.get(method)(methods.configure(method, values), model)
            generator.fit(shots, normals, prompts=prompts, seed=seed, workdir=folder)
            source = None if generator.makes_masks else SOURCES["affine"]
            trained_on[name] = generator.sample(sampling.plan(shots, normals, SAMPLES, source, seed, prompts))
        scores = {}
        for name, pairs in trained_on.items():
            net, _ = downstream.train_localiser(*sampling.stack(pairs), torch.stack(normals), settings, seed)
            maps = downstream.predict_maps(net, images).numpy()
            scores[name] = regions.pixel_metrics(maps, truth[:, 0].numpy())["pixel_ap"]
        names = ("zero-shot", "shots alone", "Crop-Paste")
        rows.append([category, *(scores[name] for name in names), truth.float().mean().item()])
    return pd.DataFrame(rows, columns=["category", *names, "chance"]).set_index("category")


def nearest(pixels: Tensor) -> pd.DataFrame:
    """How far the defect images of ``mini`` are from what the base model was trained on.

    Args:
        pixels: The world's pictures, uint8 (n, 3, 64, 64).

    Returns:
        A row a category: root mean square difference in grey levels of 255 to the nearest other defect image of the
        category, to the nearest of as many pictures of the world (mean over ``DRAWS`` random choices), and to the
        nearest of all of them; means over its defect images.
    """
    rows, rng = [], np.random.default_rng(0)
    for category, defects in mini.CATEGORIES.items():
        drawn = [image for d in defects for image, _ in _pictures(category, f"test/{d}", range(SHOTS))]
        own = (torch.stack(drawn).flatten(1) + 1) * 127.5
        scale = np.sqrt(own.shape[1])
        far = torch.cat([torch.cdist(own, part.flatten(1).float()) for part in pixels.split(2000)], 1)
        kin = torch.cdist(own, own).fill_diagonal_(torch.inf).min(1).values
        few = [rng.choice(len(pixels), min(len(own) - 1, len(pixels)), replace=False) for _ in range(DRAWS)]
        equal = torch.stack([far[:, chosen].min(1).values for chosen in few])
        rows.append([category, *(x.mean().item() / scale for x in (kin, equal, far.min(1).values))])
    names = ("nearest of its own", "of as many of the world", "of all of the world")
    return pd.DataFrame(rows, columns=["category", *names]).set_index("category")
