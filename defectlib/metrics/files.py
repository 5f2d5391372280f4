"""Where the weights of extractors and of the ImageNet classifier are, and how to get those that are not in the package.

They are looked for in ``weights/`` and in torch's own cache; a file counts only if its sha256 begins with the digits in
its name, which is the check that torch hub makes too. To fetch one::

    python -m defectlib.metrics.files inception
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from defectlib import paths
from defectlib.metrics import tiny

# Names and pages as torch-fidelity 0.4.0 (feature_extractor_inceptionv3.py) and torchvision 0.29
# (models/alexnet.py, models/vgg.py, models/resnet.py) give them; the digits begin the file's sha256.
FILES = {
    "inception": (
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/",
    ),
    "alex": ("alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/"),
    "vgg": ("vgg16-397923af.pth", "https://download.pytorch.org/models/"),
    "resnet34": ("resnet34-b627a593.pth", "https://download.pytorch.org/models/"),
}


def _how(name: str) -> str:
    file, page = FILES[name]
    return f"python -m defectlib.metrics.files {name} (or put {page}{file} into {paths.WEIGHTS})"


def _digits(file: str) -> str:
    """The beginning of the sha256 that a file's name carries."""
    return re.search(r"-([0-9a-f]{8,})\.", file)[1]


def locate(name: str) -> tuple[Path, str]:
    """The weights of a key of ``FILES`` and their sha256, in ``weights/`` or in torch's cache.

    Raises:
        FileNotFoundError: They are in neither place; the sentence holds the command that gets them.
        ValueError: The file there is not the one its name says.
    """
    file, _ = FILES[name]
    for folder in (paths.WEIGHTS, Path(torch.hub.get_dir()) / "checkpoints"):
        path = folder / file
        if path.is_file():
            digest = paths.sha256(path)
            if not digest.startswith(_digits(file)):
                raise ValueError(
                    f"{path} is damaged: its sha256 begins with {digest[:8]}, not {_digits(file)}; "
                    f"remove it, then run: {_how(name)}"
                )
            return path, digest
    raise FileNotFoundError(f"the weights {file} of '{name}' are not here; get them by: {_how(name)}")


def fetch(name: str) -> Path:
    """Download the weights of ``name`` into ``weights/`` unless they are there; the sha256 digits are checked."""
    import pooch

    file, page = FILES[name]
    if not (paths.WEIGHTS / file).is_file():
        pooch.retrieve(page + file, known_hash=None, fname=file, path=paths.WEIGHTS, progressbar=True)
    return locate(name)[0]


def available() -> dict[str, tuple[bool, str, str]]:
    """Name -> (is it usable, where it is, how to get it), for ``python -m defectlib doctor``."""
    found = {"tiny": (tiny.WEIGHTS.is_file(), str(tiny.WEIGHTS), "git checkout of defectlib/metrics/weights")}
    for name in FILES:
        try:
            found[name] = (True, str(locate(name)[0]), _how(name))
        except FileNotFoundError:
            found[name] = (False, "", _how(name))
        except ValueError as error:
            found[name] = (False, "", str(error))
    return found


def state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict; a pickle that holds anything but tensors is refused."""
    return torch.load(path, map_location="cpu", weights_only=True)


def main() -> None:
    """Fetch the weights of one extractor into ``weights/``."""
    parser = argparse.ArgumentParser(prog="python -m defectlib.metrics.files", description=main.__doc__)
    parser.add_argument("name", choices=sorted(FILES))
    print(fetch(parser.parse_args().name))


if __name__ == "__main__":
    main()
