"""The built-in benchmark ``mini``: five categories, seventeen defects, drawn from a seed in MVTec AD's layout.

Nothing is downloaded: textures are crops of scikit-image's bundled CC0 photographs, objects are rendered. The data
card is ``MINI_CARD.md`` beside this file; ``python -m defectlib.data.mini --card`` prints its table of mask areas and
``python -m defectlib.data.mini FOLDER`` builds the data set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from defectlib import images, paths
from defectlib.data import mini_object_defects as objects
from defectlib.data import mini_texture_defects as textures
from defectlib.data.mini_scene import SUPERSAMPLING, Array, Lamp, Scene, draw_lamp, illuminate, photograph, shrink
from defectlib.data.mini_subjects import SUBJECTS

VERSION = 1
STAMP = "mini.json"

PAINTERS = {
    "brick": {
        "crack": textures.brick_crack,
        "efflorescence": textures.brick_efflorescence,
        "pinhole": textures.brick_pinhole,
        "spalling": textures.brick_spalling,
    },
    "gear": {
        "corrosion": objects.gear_corrosion,
        "crack": objects.gear_crack,
        "missing_tooth": objects.gear_missing_tooth,
    },
    "grass": {"burn": textures.grass_burn, "cut": textures.grass_cut, "thread": textures.grass_thread},
    "gravel": {"oil": textures.gravel_oil, "plastic": textures.gravel_plastic, "twig": textures.gravel_twig},
    "nut": {
        "broken_corner": objects.nut_broken_corner,
        "heat_tint": objects.nut_heat_tint,
        "pinhole": objects.nut_pinhole,
        "scratch": objects.nut_scratch,
    },
}
CATEGORIES: dict[str, tuple[str, ...]] = {category: tuple(defects) for category, defects in PAINTERS.items()}

# In AdaBLDM's form "a {object} with a {defect}" (its prepare/ scripts), in plain English.
PROMPTS: dict[str, dict[str, str]] = {
    "brick": {
        "crack": "a brick wall with a crack",
        "efflorescence": "a brick wall with white efflorescence",
        "pinhole": "a brick wall with pinholes",
        "spalling": "a brick wall with spalling",
    },
    "gear": {
        "corrosion": "a gear with corrosion",
        "crack": "a gear with a crack",
        "missing_tooth": "a gear with a missing tooth",
    },
    "grass": {"burn": "grass with a burn", "cut": "grass with a cut", "thread": "grass with a thread"},
    "gravel": {
        "oil": "gravel with an oil stain",
        "plastic": "gravel with a piece of plastic",
        "twig": "gravel with a twig",
    },
    "nut": {
        "broken_corner": "a nut with a broken corner",
        "heat_tint": "a nut with heat tint",
        "pinhole": "a nut with pinholes",
        "scratch": "a nut with a scratch",
    },
}


def _generator(category: str, kind: str, index: int, seed: int, stream: int) -> np.random.Generator:
    """One generator per image and per stream (0 subject, 1 defect, 2 camera); no image depends on another."""
    return np.random.default_rng([seed, zlib.crc32(f"{category}/{kind}".encode()), index, stream])


def _compose(category: str, kind: str, index: int, seed: int, size: int, clean: bool) -> tuple[Scene, Lamp, Array]:
    split, _, name = kind.partition("/")
    defects = PAINTERS.get(category)
    if defects is None or split not in ("train", "test") or (name != "good" and name not in defects):
        known = f"{', '.join(CATEGORIES)} with train/good, test/good and test/<defect>"
        raise ValueError(f"mini has no '{category}' '{kind}'; it has {known}")
    rng = _generator(category, kind, index, seed, 0)
    lamp = draw_lamp(rng)
    scene = SUBJECTS[category](rng, lamp, SUPERSAMPLING * size)
    if name == "good" or clean:
        return scene, lamp, np.zeros_like(scene.relief)
    scene, cover = defects[name](scene, lamp, _generator(category, kind, index, seed, 1))
    return scene, lamp, cover


def _threshold(cover: Array, size: int) -> Tensor:
    """Bool (1, size, size): pixels at least half covered; of a defect thinner than that, the most covered ones."""
    share = shrink(cover, size)
    level = 0.5 if share.max() >= 0.5 or not share.any() else share.max()
    return torch.from_numpy(share >= level)[None]


def draw(
    category: str, kind: str, index: int, seed: int = 0, size: int = 128, clean: bool = False
) -> tuple[Tensor, Tensor]:
    """One picture of the benchmark without building it.

    Args:
        category: A key of :data:`CATEGORIES`.
        kind: ``"train/good"``, ``"test/good"`` or ``"test/<defect>"``.
        index: The number in the file's name.
        seed: The benchmark's seed.
        size: Side in px.
        clean: Leave the defect out: the same piece under the same lamp and camera, undamaged.

    Returns:
        The image, float32 (3, size, size) in [-1, 1] with 256 levels, and its mask, bool (1, size, size).

    Raises:
        ValueError: There is no such category or kind.
    """
    scene, lamp, cover = _compose(category, kind, index, seed, size, clean)
    colour = photograph(illuminate(scene, lamp), _generator(category, kind, index, seed, 2), size)
    return images.from_uint8(np.round(colour * 255).astype(np.uint8)), _threshold(cover, size)


def foreground(category: str, kind: str, index: int, seed: int = 0, size: int = 128) -> Tensor:
    """Where the object of an image is, bool (1, size, size): known, not found. Textures fill the frame.

    Holes through the object and broken-off parts are background. The arguments are those of :func:`draw`.
    """
    scene, _, _ = _compose(category, kind, index, seed, size, clean=False)
    return torch.from_numpy(shrink(scene.cover, size) >= 0.5)[None]


def listing(categories: Sequence[str], shots: int, train: int, test: int) -> Iterator[tuple[str, str, int]]:
    """Category, kind and index of every image of a build, in a fixed order."""
    for category in categories:
        counts = {"train/good": train, "test/good": test} | {f"test/{name}": shots for name in CATEGORIES[category]}
        for kind, count in counts.items():
            for index in range(count):
                yield category, kind, index


def build(
    root: Path | str,
    seed: int = 0,
    categories: Sequence[str] | None = None,
    shots: int = 24,
    train: int = 60,
    test: int = 20,
    size: int = 128,
) -> Path:
    """Draw the benchmark under ``root`` in MVTec AD's layout, or return at once if it is already there, whole.

    It is drawn in a hidden folder beside ``root`` and renamed when complete, so ``root`` never holds half of it. The
    stamp ``mini.json`` records version, arguments and one sha256 over all pictures; a build with other arguments, or
    with pictures changed or missing, is replaced.

    Args:
        root: Folder of the data set.
        seed: Everything follows from it.
        categories: Some of :data:`CATEGORIES`; None is all.
        shots: Defect images a defect.
        train: Normals in ``train/good`` a category.
        test: Normals in ``test/good`` a category.
        size: Side in px.

    Returns:
        ``root``.

    Raises:
        ValueError: An argument is out of range, or ``root`` holds something that is not a build of ``mini``.
    """
    root = Path(root)
    chosen = sorted(CATEGORIES if categories is None else set(categories))
    if unknown := [name for name in chosen if name not in CATEGORIES]:
        raise ValueError(f"mini has no category '{unknown[0]}'; choose from {', '.join(CATEGORIES)}")
    if not chosen or min(shots, train, test) < 1 or size < 16 or seed < 0:
        raise ValueError("mini needs a category, a seed >= 0, shots, train and test >= 1 and size >= 16 px")
    counts = {"shots": shots, "train": train, "test": test, "size": size}
    wanted = {"name": "mini", "version": VERSION, "seed": seed, "categories": chosen} | counts
    # The kernel drops the lock of a killed build; what that build left is cleared by the next one.
    with paths.locked(root.parent / f".{root.name}.build.lock"):
        if _is_complete(root, wanted):
            return root
        _refuse_foreign(root)
        partial, old = root.parent / f".{root.name}.part", root.parent / f".{root.name}.old"
        for folder in (partial, old):
            if folder.exists():
                shutil.rmtree(folder)
        for category, kind, index in listing(chosen, shots, train, test):
            _write(partial / category, category, kind, index, seed, size)
        stamp = wanted | {"sha256": digest(partial)}
        paths.write_text(partial / STAMP, json.dumps(stamp, indent=1) + "\n")
        if root.exists():
            root.rename(old)
        partial.rename(root)
        if old.exists():
            shutil.rmtree(old)
    return root


def _write(folder: Path, category: str, kind: str, index: int, seed: int, size: int) -> None:
    image, mask = draw(category, kind, index, seed, size)
    images.write_image(folder / kind / f"{index:03d}.png", image)
    if not kind.endswith("/good"):
        images.write_mask(folder / "ground_truth" / kind.split("/")[1] / f"{index:03d}_mask.png", mask)


def digest(root: Path) -> str:
    """One sha256 over the names and bytes of all PNG files under ``root``, in sorted order."""
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.png")):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def _is_complete(root: Path, wanted: dict) -> bool:
    if not (root / STAMP).is_file():
        return False
    try:
        stamp = json.loads((root / STAMP).read_text())
    except ValueError:
        return False
    return (
        isinstance(stamp, dict)
        and stamp == wanted | {"sha256": stamp.get("sha256")}
        and stamp["sha256"] == digest(root)
    )


def _refuse_foreign(root: Path) -> None:
    """Raise ValueError rather than replace a folder that holds anything but this benchmark."""
    if not root.exists():
        return
    ours = set(CATEGORIES) | {STAMP}
    strangers = (
        [path.name for path in sorted(root.iterdir()) if path.name not in ours] if root.is_dir() else [root.name]
    )
    if strangers:
        raise ValueError(f"{root} holds '{strangers[0]}', which is not of mini: move it away or choose another folder")


def areas(category: str, defect: str, shots: int = 24, seed: int = 0, size: int = 128) -> list[float]:
    """Share of the image that each shot's mask covers."""
    covers = (_compose(category, f"test/{defect}", index, seed, size, clean=False)[2] for index in range(shots))
    return [_threshold(cover, size).float().mean().item() for cover in covers]


def card_row(category: str, defect: str) -> str:
    """The data card's line about a defect at the default arguments."""
    ratios = areas(category, defect)
    mean = sum(ratios) / len(ratios)
    kind = "small" if mean < 0.053 else "large"
    return f"| {category} | {defect} | {len(ratios)} | {mean:.4f} | {min(ratios):.4f}-{max(ratios):.4f} | {kind} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the benchmark into a folder, or print the data card's table."""
    parser = argparse.ArgumentParser(prog="python -m defectlib.data.mini", description=__doc__.split("\n")[0])
    parser.add_argument("root", nargs="?", type=Path, help="build here; default: data/mini")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--card", action="store_true", help="print the table of mask areas and build nothing")
    given = parser.parse_args(arguments)
    if not given.card:
        print(build(given.root or paths.DATA / "mini", given.seed))
        return
    print("| category | defect | shots | mean area ratio | range | size |\n| --- | --- | --- | --- | --- | --- |")
    for category, defects in CATEGORIES.items():
        for defect in defects:
            print(card_row(category, defect))


if __name__ == "__main__":
    main()
