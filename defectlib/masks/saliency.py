"""U^2-Net (Qin et al., 2020) on an anomaly part: how DualAnoDiff reads its masks. Optional, to compare with.

The network is rembg's ONNX export of the released weights, in ``weights/``, run by onnxruntime, which is an extra of
this package: ``pip install 'defectlib[saliency]'``. Nothing is downloaded, and nothing else needs it.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from defectlib import images, paths

FILE, MD5 = "u2net.onnx", "60024c5c889badc19c04ad937298a77b"
PAGE = "https://github.com/danielgatis/rembg/releases/download/v0.0.0/"
SIDE = 320
MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Run = Callable[[np.ndarray], np.ndarray]


def how() -> str:
    """What brings it here."""
    return f"put {PAGE}{FILE} into {paths.WEIGHTS} and run `pip install 'defectlib[saliency]'`"


def problem() -> str | None:
    """One sentence on what keeps U^2-Net from being used, or None."""
    file = paths.WEIGHTS / FILE
    if not file.is_file():
        return f"U^2-Net is not here: {how()}"
    if hashlib.md5(file.read_bytes()).hexdigest() != MD5:
        return f"{file} is damaged or another file (its md5 is not {MD5}): remove it, then {how()}"
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: run `pip install 'defectlib[saliency]'`"
    return None


def load(file: Path | None = None) -> Run:
    """The network as a function of a normalised batch, float32 (1, 3, 320, 320), to its finest map (1, 1, 320, 320).

    Raises:
        FileNotFoundError: It cannot be used; the sentence holds the remedy.
    """
    if file is None and (sentence := problem()) is not None:
        raise FileNotFoundError(sentence)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file or paths.WEIGHTS / FILE), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch})[0]


def mask(part: Tensor, run: Run) -> Tensor:
    """The salient pixels of an anomaly part, as the released code's consumer reads them: saliency above 0.5.

    Args:
        part: float32 (3, H, W) in [-1, 1].
        run: From :func:`load`.

    Returns:
        bool (1, H, W). The map is stretched between its extremes, as the network's authors do, so a part without a
        defect gives a mask too; where it is constant the mask is empty.
    """
    height, width = part.shape[1:]
    picture = Image.fromarray(images.to_uint8(part)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    values = np.asarray(picture, np.float32)
    values = (values / max(values.max(), 1e-6) - MEAN) / SD
    found = run(values.transpose(2, 0, 1)[None].astype(np.float32))[0, 0]
    spread = found.max() - found.min()
    if spread <= 0:
        return torch.zeros(1, height, width, dtype=torch.bool)
    stretched = Image.fromarray(((found - found.min()) / spread).astype(np.float32))
    return torch.from_numpy(np.array(stretched.resize((width, height), Image.Resampling.BILINEAR)) > 0.5)[None]
