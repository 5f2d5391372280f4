"""DualAnoDiff's two branches in one UNet: LoRA routed by branch, interaction (SAIM), background compensation (BCM).

A batch holds the rows of the image branch first, then as many rows of the part branch. Both go through one frozen UNet
in one pass: every attention projection adds the LoRA of the row's own branch, after every attention layer the two rows
of a pair exchange what they hold at the same position (SAIM), and the self-attention of image rows may read a
background (BCM).
"""

from defectlib.branches.compensation import Compensation
from defectlib.branches.dual import PROMPTS, Dual
from defectlib.branches.interaction import FoldedInteraction, Interaction, pair_attention
from defectlib.branches.learning import dual_loss
from defectlib.branches.recovery import found_again
from defectlib.branches.routing import BRANCHES, lora
from defectlib.branches.unet import BranchProcessor, BranchUNet

__all__ = [
    "BRANCHES", "PROMPTS", "BranchProcessor", "BranchUNet", "Compensation", "Dual", "FoldedInteraction", "Interaction",
    "dual_loss", "found_again", "lora", "pair_attention",
]  # fmt: skip
