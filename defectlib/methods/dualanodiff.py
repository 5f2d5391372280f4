"""DualAnoDiff (paper 003; CVPR 2025): an anomaly image and its anomaly part drawn together; the mask is the part's.

Two branches of one frozen latent diffusion model (``branches``): the image, with "a vfx with sks", and the part, the
image times its mask on mid-grey, with "sks". They share the timestep and have noise of their own. One model is trained
a category and defect. The normal image of a request is not drawn on: with background compensation it lends its
background, without it is not looked at.

Where the released code (yinyjin/DualAnoDiff) differs, :meth:`DualAnoDiffConfig.as_released` names it, but for the last
rows, which are never followed:

====================  ==========================================  =======================================
what                  here                                        released
====================  ==========================================  =======================================
SAIM's last layer     zero, so that training starts at the base   random
BCM                   adds to keys and values, gamma from 0.1,    mixes them, gamma from 0, linear; a second,
                      ReLU between                                unread MLP in each cross-attention
background latents    scaled by the VAE's factor                  unscaled
--------------------  ------------------------------------------  ---------------------------------------
scheduler             the base model's noise schedule, DDIM       PNDM
background pass       the frozen base with an empty prompt, no    the UNet that is trained, with gradients
                      gradient; one noise for all samples
unconditional rows    the same background as conditional ones     latents of a zero image
crops                 off (``paper``: three a shot); a fixed set   resized and cropped anew each time
latents               the mean of the VAE's posterior              a draw of it
a pair is kept        with a mask of half to twice the shots'      always
                      area, else drawn again
normal images         as many as ``max_normals``; one a group      the first third; one for 50 samples
flips                 of every category, unless switched off      none for "cable"
mask                  the part's departure from its ground, which   U^2-Net on the part, at 0.5
                      is read off its border
====================  ==========================================  =======================================

U^2-Net can be compared with where its weights are (``masks.saliency``); ``04_methods`` does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from defectlib.methods.base import register
from defectlib.methods.pairs import PairConfig, PairMethod


class DualAnoDiffConfig(PairConfig):
    """The paper's values are the defaults; its ablations are ``interaction`` (SAIM) and ``compensation`` (BCM).

    Attributes:
        released: SAIM and BCM as in the released code, see :meth:`as_released`.
    """

    released: bool = False

    @classmethod
    def compensated(cls, **changes) -> DualAnoDiffConfig:
        """With BCM, and what the paper sets beside it: batch 2, 50 steps, guidance 2.0."""
        beside = {"train_batch_size": 2, "num_inference_steps": 50, "guidance_scale": 2.0}
        return cls(**{"compensation": True} | beside | changes)

    @classmethod
    def as_released(cls, **changes) -> DualAnoDiffConfig:
        """The released code's values, where they differ from the paper's."""
        return cls(**{"released": True} | changes)


@register("dualanodiff")
class DualAnoDiff(PairMethod):
    """See the module's docstring."""

    Config = DualAnoDiffConfig
    title = "DualAnoDiff"
    scope = "defect"

    def parts(self) -> dict[str, Any]:
        """With the released form where it is asked for."""
        return super().parts() | {"released": self.config.released}

    def _encode(self, images: Tensor, name: str) -> Tensor:
        """Latents; the released code forgets the VAE's factor for backgrounds."""
        latents = super()._encode(images, name)
        unscaled = self.config.released and name == "background"
        return latents / self.backbone.vae.config.scaling_factor if unscaled else latents
