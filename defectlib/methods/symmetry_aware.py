"""The symmetry-aware system (paper 000; Symmetry 18(7):1101): DualAnoDiff for several defects at once.

Only the abstract is at hand. Stated by the paper are three parts, built on DualAnoDiff's two branches: CSB-LoRA
("cross-class shared low-rank bases with class-dependent coefficients"), TDAM (interaction, background and fusion
"according to the denoising stage") and SGRL ("stronger spatial constraints to defect regions and boundary
neighborhoods"). Rank, number of bases, the gates' form, the band's width, all weights, steps and prompts are not
stated; they are our reading, and stand with their equations in ``branches.classes``, ``branches.gates`` and
``branches.guidance``. With all three off, and one class, a training step is DualAnoDiff's to the bit.

One model is trained for all defects of a category, or of all categories (``scope``), and sees each of them
equally often. Prompts stay "a vfx with sks" and "sks": classes differ by their coefficients alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from defectlib.augmentation import Pictures
from defectlib.branches import Dual
from defectlib.branches.classes import DEPARTURE, OWN, START, Form, discrepancy, orthogonality, scaled_layers
from defectlib.branches.gates import Schedule
from defectlib.branches.guidance import min_snr, spatial_weights
from defectlib.methods.base import register
from defectlib.methods.pairs import PairConfig, PairMethod, area_range, left_out
from defectlib.training import Curve
from defectlib.types import Request, Shot

GROUP = "all"


class SymmetryAwareConfig(PairConfig):
    """DualAnoDiff's values for what the two share; the rest is our reading.

    Attributes:
        scope: Classes are the defects of a category, or of all categories together, which then share one model.
        adapters: CSB-LoRA ("csb"); to compare with, one LoRA that all classes share, a LoRA for each of them apart, or
            VeRA's frozen random bases with two learned vectors a class, see ``branches.vera``. What coefficients can
            be given besides is then without effect.
        balanced: Pictures of a defect with fewer shots come again, so that an epoch has as many of each defect:
            ``steps`` are then of every defect. False: by their number. The same where all have equally many shots.
        tie_blocks: Coefficients a class and LoRA, a divisor of ``rank``; None is ``rank`` of them.
        coefficient_start: Standard deviation of the departures d_c before training.
        own_rate: Learning rate of what is few, coefficients, vectors and gates, as a multiple of ``learning_rate``:
            weights act together and need small steps, these act alone and would hardly move in a short fit.
        shrinkage: Of d_c towards what all share: its weight decay, apart from the loss. As a term of the loss it would
            be all of d_c's gradient in the first step, where B is zero, and Adam would make a full step of it.
        orthogonality: Weight of the bases' departure from orthogonal rows.
        discrepancy: Weight of max(0, cos(d_c, d_c') - discrepancy_margin) over pairs of classes.
        discrepancy_margin: See there.
        gates: TDAM's schedule: learned from "neutral" or from the "prior", or fixed ("cosine"); None: off.
        guidance: SGRL.
        mask_weight: lambda_m inside the defect.
        band_weight: lambda_b around its boundary.
        band: Half the band's width, in latent cells.
        most: The mask's largest share of a picture's weight.
        softness: Sigma in cells of a soft edge; 0: hard.
        x0_space: Errors of x_0 with min-SNR weights instead of the base's own target.
    """

    scope: Literal["category", "dataset"] = "category"
    adapters: Form | Literal["shared"] = "csb"
    balanced: bool = True
    tie_blocks: int | None = Field(None, ge=1)
    coefficient_start: float = Field(START, ge=0)
    own_rate: float = Field(1.0, gt=0)
    shrinkage: float = Field(0.1, ge=0)
    orthogonality: float = Field(0.0, ge=0)
    discrepancy: float = Field(0.0, ge=0)
    discrepancy_margin: float = Field(0.0, ge=-1, le=1)
    gates: Schedule | None = "neutral"
    guidance: bool = True
    mask_weight: float = Field(4.0, ge=0)
    band_weight: float = Field(2.0, ge=0)
    band: int = Field(2, ge=1)
    most: float = Field(0.5, gt=0, lt=1)
    softness: float = Field(0.0, ge=0)
    x0_space: bool = False

    @model_validator(mode="after")
    def _one_form(self) -> SymmetryAwareConfig:
        if self.tie_blocks and self.adapters != "csb":
            raise ValueError(f"tie_blocks are of the adapters 'csb', not of '{self.adapters}': leave them out")
        if self.tie_blocks and self.rank % self.tie_blocks:
            raise ValueError(
                f"{self.tie_blocks} blocks do not divide rank {self.rank}: choose a divisor for tie_blocks"
            )
        return self


@register("symmetry_aware")
class SymmetryAware(PairMethod):
    """See the module's docstring."""

    Config = SymmetryAwareConfig
    title = "the symmetry-aware system"
    scope = "category"

    def name_of(self, of: Shot | Request) -> str:
        """With its category where classes are of several."""
        return of.defect if self.config.scope == "category" else f"{of.category}/{of.defect}"

    def group(self, defect: str) -> str:
        """One model for all."""
        return GROUP

    def parts(self) -> dict[str, Any]:
        """Coefficients for as many classes as there are defects, and the gates."""
        config = self.config
        found = super().parts() | {"gates": config.gates}
        if config.adapters != "shared":
            found |= {"classes": len(self.areas), "blocks": config.tie_blocks, "start": config.coefficient_start}
            found |= {"form": config.adapters}
        return found

    def shares(self) -> bool:
        """All but a LoRA each."""
        return self.config.adapters != "separate"

    def classes(self, defect: str) -> Tensor | None:
        """The defect's own class."""
        return torch.tensor([list(self.areas).index(defect)]) if self.config.adapters != "shared" else None

    def learn(self, shots: Sequence[Shot], *, seed: int, workdir: Path) -> Curve:
        """Learn one more defect after the fit, with all that classes share frozen: its coefficients alone are trained.

        They start as a class does in a fit and are trained for ``steps``, with the fit's settings. What was fitted
        before is left as it is, and draws the same images.

        Args:
            shots: Of one defect that was not learned yet.
            seed: Of the training.
            workdir: Where a killed training goes on.

        Returns:
            The curve of the loss.

        Raises:
            ValueError: Nothing was fitted, classes share one LoRA or nothing, the defect is known, there are several,
                or a shot cannot be learned from (see ``fit``).
        """
        if not self.states:
            raise ValueError(f"{self.title} is not fitted: a new class needs the bases of others")
        if self.config.adapters in ("shared", "separate"):
            what = "one LoRA for all classes" if self.config.adapters == "shared" else "a LoRA for each class"
            raise ValueError(f"{what} has no coefficients to learn a new one by: fit with the adapters 'csb'")
        read = self.readable(shots, [])
        if len(read) > 1:
            raise ValueError(f"one new defect at a time: these shots are of {', '.join(read)}")
        if (new := next(iter(read))) in self.areas:
            raise ValueError(f"{self.title} has learned '{new}' already; it knows {', '.join(self.areas)}")
        self.left_out |= left_out(map(self.name_of, shots), read)
        shots = read[new]
        known, before = self.areas, self.states[GROUP]
        self.areas = known | {new: area_range(shots)}
        blank = self.untrained(seed).trained_state()
        rows = {name: torch.cat([before[name], blank[name][-1:]]) for name in blank if name.endswith(OWN)}
        try:
            learned, curve = self._fit(new, shots, seed, workdir, before | rows)
        except BaseException:
            self.areas = known
            raise
        # The optimiser's weight decay also reaches the rows of the other classes: they are put back.
        rows = {name: torch.cat([before[name], learned[name][-1:]]) for name in rows}
        self.states[GROUP], self._dual, self._holds = before | rows, None, ""
        return curve

    def between(self, request: Request, other: str, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        """A request's pair on its way to another defect, from the same noise.

        Args:
            request: Of the defect that it starts from.
            other: The defect that it goes to.
            shares: Of the other's coefficients, the rest are the request's: 0 is the pair that it asks for.

        Returns:
            Images and parts, (K, 3, H, W) in [-1, 1], one for each share.

        Raises:
            ValueError: The fit has one LoRA for all classes, or a defect was not learned.
        """
        first = self.name_of(request)
        if self.config.adapters == "shared":
            raise ValueError("one LoRA for all classes holds nothing between two: fit with the adapters 'csb'")
        if not self.states:
            raise ValueError(f"{self.title} is not fitted: call fit or load first")
        order = list(self.areas)
        if unknown := sorted({first, other} - set(order)):
            raise ValueError(f"{self.title} was fitted on {', '.join(order)}, not on '{unknown[0]}'")
        drawn = []
        try:
            for share in shares:
                mixed = torch.zeros(1, len(order))
                mixed[0, order.index(first)] += 1 - share
                mixed[0, order.index(other)] += share
                self.dual(first).load_trained(self.states[GROUP], mixed)
                drawn.append(self.denoised([request]))
        finally:
            self._holds = ""  # its weights are of no defect
        images, parts = zip(*drawn, strict=True)
        return torch.cat(images), torch.cat(parts)

    def step(self, pictures: Pictures, shots: Sequence[Shot]) -> Callable[[Tensor], dict[str, Any]]:
        """Classes of the rows, and SGRL's weights, which are computed once a picture."""
        config, base = self.config, self.backbone
        order = list(self.areas)
        classes = torch.tensor([order.index(self.name_of(shot)) for shot in shots])[pictures.of_shot]
        spatial = self.spatial(pictures.masks).to(base.device) if config.guidance else None

        def given(items: Tensor) -> dict[str, Any]:
            found: dict[str, Any] = {"classes": classes[items].to(base.device)} if config.adapters != "shared" else {}
            if spatial is not None or config.x0_space:
                found["weigh"] = lambda timesteps: self._weights(spatial, items, timesteps)
            return found

        return given

    def spatial(self, masks: Tensor) -> Tensor:
        """SGRL's weights of masks bool (N, 1, H, W), (N, 1, h, w)."""
        config, size = self.config, self.backbone.latent_shape(masks.shape[-1])[1:]
        return spatial_weights(
            masks, size, mask_weight=config.mask_weight, band_weight=config.band_weight, radius=config.band,
            most=config.most, softness=config.softness,
        )  # fmt: skip

    def _weights(self, spatial: Tensor | None, items: Tensor, timesteps: Tensor) -> Tensor:
        """(N, 1, h, w), or (N, 1, 1, 1), of a step's rows."""
        weights = 1.0 if spatial is None else spatial[items]
        return weights * min_snr(timesteps, self.backbone.scheduler) if self.config.x0_space else weights

    def factors(self, dual: Dual) -> list[float] | None:
        """``own_rate`` for coefficients, vectors and gates."""
        few = (name.endswith(OWN) or ".gates." in name for name in _trained(dual))
        return [self.config.own_rate if own else 1.0 for own in few]

    def decays(self, dual: Dual) -> list[float | None] | None:
        """``shrinkage`` for coefficients."""
        return [self.config.shrinkage if name.endswith(DEPARTURE) else None for name in _trained(dual)]

    def turns(self, names: Sequence[str]) -> list[int]:
        """Each picture once, and those of defects with fewer again, in turn."""
        most = max(Counter(names).values()) if self.config.balanced else 0
        own = {defect: [i for i, name in enumerate(names) if name == defect] for defect in dict.fromkeys(names)}
        again = [i for items in own.values() for i in islice(cycle(items), max(0, most - len(items)))]
        return super().turns(names) + again

    def penalty(self, dual: Dual) -> Tensor | float:
        """Orthogonality and discrepancy, those that have a weight."""
        config, total = self.config, 0.0
        layers = scaled_layers(dual)
        if layers and config.orthogonality:
            total = total + config.orthogonality * orthogonality(layers)
        if layers and config.discrepancy:
            total = total + config.discrepancy * discrepancy(layers, config.discrepancy_margin)
        return total


def _trained(dual: Dual) -> list[str]:
    """The names of what a fit trains, in the optimiser's order."""
    return [name for name, value in zip(dual.names, dual.trained, strict=True) if value.requires_grad]
