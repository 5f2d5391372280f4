"""Methods that draw an image and its anomaly part together, and read the mask off the part: what they share.

A model is trained for each group of defects: one a defect (DualAnoDiff), or one for all (the symmetry-aware system).
The normal image of a request is not drawn on: with background compensation it lends its background, without it is
not looked at. A base model that does not know the objects may learn the category's normal images first (``adapt`` in a
profile, see ``adaptation.to_objects``); the papers do not do that.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from defectlib import paths
from defectlib.augmentation import Pictures, background, training_pictures
from defectlib.backbone import ENCODE_BATCH, Backbone
from defectlib.branches import Dual, dual_loss
from defectlib.branches.classes import OWN
from defectlib.diffusion import denoise, noise_like
from defectlib.masks.extraction import FLOOR, TINT, extract
from defectlib.masks.interpolation import area_of, flaws
from defectlib.masks.trimap import foreground
from defectlib.methods.base import MethodConfig, require_base, require_fitted_on
from defectlib.training import ENDED, Curve, FitSettings, State, digest, fit, once
from defectlib.types import Request, Sample, Shot

# What starts from noise: each has a stream of its own under one seed.
IMAGE, PART, BACKGROUND = range(3)
DEFECTS = "defects"
"""In a file of weights: whose they are. Of as many other defects they would load, and draw those."""


class PairConfig(MethodConfig):
    """DualAnoDiff's values are the defaults.

    Attributes:
        steps: Of a defect: a model of several trains that often for each, so that methods cost the same.
        schedule: Of the learning rate: constant as in the paper, or a cosine to zero, for short fits at a high rate.
        rank: Of LoRA in the UNet, one adapter a branch, and in the text encoder, one for both prompts.
        interaction: With SAIM.
        compensation: With BCM. DualAnoDiff trains with it at batch 2 and draws in 50 steps with guidance 2.0, which
            are set beside it, as in the profile ``paper``.
        flips: Also train on every shot mirrored both ways and turned by half.
        crops: Random square crops a shot that are added to it, the same for image and part, before the flips.
        crop_side: Their least side, as a share of the image's; each holds half of the defect or more.
        floor: Least departure from a part's ground that is defect, see ``masks.extraction``.
        tint: Most that the ground of a drawn part may be off mid-grey; beyond, its mask is full.
        attempts: Drawings at most until the mask has no flaw: it is neither empty nor full, and its area lies within
            half the least and twice the largest of the defect's shots.
        batch_size: Pairs a call of the model; short batches are padded, so that a sample depends on itself alone.
            At most half of what the VAE takes at once.
    """

    DRAWING: ClassVar[tuple[str, ...]] = (
        "num_inference_steps",
        "guidance_scale",
        "floor",
        "tint",
        "attempts",
        "batch_size",
    )

    steps: int = Field(5000, ge=1)
    train_batch_size: int = Field(4, ge=1)
    learning_rate: float = Field(2e-5, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    rank: int = Field(32, ge=1)
    interaction: bool = True
    compensation: bool = False
    flips: bool = True
    crops: int = Field(0, ge=0)
    crop_side: float = Field(0.8, gt=0, lt=1)
    precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    num_inference_steps: int = Field(100, ge=1)
    guidance_scale: float = Field(2.5, ge=1)
    floor: float = Field(FLOOR, ge=0, lt=1)
    tint: float = Field(TINT, ge=0, lt=1)
    attempts: int = Field(4, ge=1)
    batch_size: int = Field(4, ge=1, le=ENCODE_BATCH // 2)


class PairMethod:
    """Fit, draw, save and load. A method says how defects are grouped, and what a model of its own has.

    Class attributes:
        title: The method's name in sentences.
    """

    title: ClassVar[str]
    scope: ClassVar[Literal["category", "defect"]]
    makes_masks = True
    preserves_background = False
    needs_backbone = True
    one_normal_a_group = True

    def __init__(self, config: PairConfig, backbone: Backbone | None = None) -> None:
        require_base(backbone, self.title)
        self.config, self.backbone = config, backbone
        self.states: dict[str, State] = {}
        self.curves: dict[str, Curve] = {}
        self.areas: dict[str, tuple[float, float]] = {}
        self.left_out: dict[str, int] = {}
        self._dual: Dual | None = None
        self._holds = ""

    def fit(
        self, shots: Sequence[Shot], normals: Sequence[Tensor], *, prompts: dict[str, str], seed: int, workdir: Path
    ) -> None:
        """Train one model a group of defects; the prompts are DualAnoDiff's, so ``prompts`` changes nothing.

        A shot off whose part no mask can be read is left out: its mask covers most of the image's border, or what it
        shows is as grey as the ground of parts. So is, with compensation, one that shows no background. ``left_out``
        counts them by defect.

        Raises:
            ValueError: There is no shot, all shots of a defect would be left out, a shot's mask covers the whole image,
                or compensation is asked for where no shot of a defect, or not every normal, has a background.
        """
        by_defect = self.readable(shots, normals)
        self.left_out = left_out(map(self.name_of, shots), by_defect)
        read = {id(shot) for own in by_defect.values() for shot in own}
        shots = [shot for shot in shots if id(shot) in read]
        self.states, self.curves = {}, {}
        self._dual, self._holds = None, ""
        self.areas = {defect: area_range(own) for defect, own in by_defect.items()}
        for group in dict.fromkeys(map(self.group, by_defect)):
            own = [shot for shot in shots if self.group(self.name_of(shot)) == group]
            self.states[group], self.curves[group] = self._fit(group, own, seed, workdir)

    def readable(self, shots: Sequence[Shot], normals: Sequence[Tensor]) -> dict[str, list[Shot]]:
        """The shots of each defect that can be learned from; ValueError where there is none, see :meth:`fit`."""
        if not shots:
            raise ValueError(f"{self.title} needs at least one shot of a defect to learn from")
        if full := [shot for shot in shots if shot.mask.all()]:
            raise ValueError(
                f"the mask of shot {full[0].defect}/{full[0].id} covers the whole image: its part would be the image; "
                "remove the pair or correct the mask"
            )
        self.backbone.latent_shape(shots[0].image.shape[-1])
        by_defect: dict[str, list[Shot]] = {}
        for shot in shots:
            by_defect.setdefault(self.name_of(shot), []).append(shot)
        for defect, own in by_defect.items():  # by the usual floor: the config's is of drawing, and changes no fit
            by_defect[defect] = [shot for shot in own if _taught(shot)]
            if not by_defect[defect]:
                raise ValueError(
                    f"no shot of {defect} can be learned from: no mask can be read off its part, as of "
                    f"{own[0].defect}/{own[0].id}, because the mask covers most of the image's border (cut a larger "
                    "window) or the defect is as grey as the ground of parts"
                )
        for defect, own in by_defect.items() if self.config.compensation else ():
            by_defect[defect] = [shot for shot in own if not foreground(shot.image).all()]
            if not by_defect[defect]:
                raise ValueError(
                    f"compensation needs a background, and in the shots of {own[0].category}/{defect} the surface "
                    "fills the frame: set compensation to false"
                )
        blank = sum(bool(foreground(image).all()) for image in normals) if self.config.compensation else 0
        if blank:
            raise ValueError(
                f"compensation needs a background, and {blank} of {len(normals)} normal images of {shots[0].category} "
                "show none: leave them out, or set compensation to false"
            )
        return by_defect

    def name_of(self, of: Shot | Request) -> str:
        """How a fit names the defect of a shot or a request."""
        return of.defect

    def group(self, defect: str) -> str:
        """Which model draws a defect: one of its own, unless a method says otherwise."""
        return defect

    def parts(self) -> dict[str, Any]:
        """What a model's branches have, for :class:`~defectlib.branches.Dual`."""
        return {"interaction": self.config.interaction, "compensation": self.config.compensation}

    def classes(self, defect: str) -> Tensor | None:
        """The class that a defect is drawn as, for ``BranchUNet.fold``."""
        return None

    def step(self, pictures: Pictures, shots: Sequence[Shot]) -> Callable[..., dict[str, Any]]:
        """What a training step is given besides its rows: items (B,) to the keyword arguments of ``dual_loss``."""
        return lambda items: {}

    def factors(self, dual: Dual) -> list[float] | None:
        """Of the learning rate, one a parameter that is trained; None: all 1."""
        return None

    def decays(self, dual: Dual) -> list[float | None] | None:
        """Weight decay, one a parameter that is trained, None for the fit's own; None: all that."""
        return None

    def turns(self, names: Sequence[str]) -> list[int]:
        """Which pictures an epoch has, given the defects that they are of: each once."""
        return [*range(len(names))]

    def penalty(self, dual: Dual) -> Tensor | float:
        """What is added to every step's loss."""
        return 0.0

    def _fit(
        self, group: str, shots: Sequence[Shot], seed: int, workdir: Path, start: State | None = None
    ) -> tuple[State, Curve]:
        """Train the model of one group, or take it from where a killed run had ended it; ``save`` clears that.

        From a ``start`` only what classes have of their own is trained, the rest stays as it is there.
        """
        config, base = self.config, self.backbone
        pictures = training_pictures(
            shots, seed, flips=config.flips, crops=config.crops, crop_side=config.crop_side,
            backgrounds=config.compensation,
        )  # fmt: skip

        def train(checkpoints: Path) -> tuple[State, Curve]:
            latents = {name: self._encode(images, name) for name, images in pictures.shown.items()}
            dual = self.untrained(seed)
            if start is not None:
                dual.set_trained(start)
                for name, value in zip(dual.names, dual.trained, strict=True):
                    value.requires_grad_(name.endswith(OWN))
            given = self.step(pictures, shots)
            turns = torch.tensor(self.turns([self.name_of(shots[i]) for i in pictures.of_shot]))

            def loss(drawn: Tensor, generator: torch.Generator) -> Tensor:
                items = turns[drawn]
                clean = {name: x[items] for name, x in latents.items()}
                return dual_loss(dual, base, clean, generator, **given(items)) + self.penalty(dual)

            steps = config.steps * len(set(map(self.name_of, shots)))
            settings = FitSettings(
                steps=steps, batch_size=config.train_batch_size, learning_rate=config.learning_rate,
                schedule=config.schedule, precision=config.precision,
            )  # fmt: skip
            curve = fit(
                dual.trained,
                loss,
                len(turns),
                settings,
                seed=seed,
                folder=checkpoints,
                factors=self.factors(dual),
                decays=self.decays(dual),
            )
            return dual.trained_state(), curve

        learned = digest([*pictures.shown.values(), pictures.masks])
        asked = [base.digest, config.fit_values(), learned, [*map(self.name_of, shots)], seed]
        # By name: what is read from a file has another order than what was just trained.
        asked += [] if start is None else [digest(start[name] for name in sorted(start))]
        return once(workdir / ENDED / f"{group}.safetensors", asked, train)

    def untrained(self, seed: int) -> Dual:
        """A model of this configuration as it is before a fit with this seed."""
        config = self.config
        return Dual(self.backbone, config.rank, seed, checkpointing=config.gradient_checkpointing, **self.parts())

    def sizes(self) -> dict[str, int]:
        """How many numbers were trained: in the UNet's adapters, shared and by class, in the rest, and in all."""
        state = next(iter(self.states.values()))
        adapters = {name: v for name, v in state.items() if name.startswith("branches.") and ".lora_" in name}
        whole, every = (sum(v.numel() for v in some.values()) * len(self.states) for some in (adapters, state))
        own = sum(v.numel() for name, v in adapters.items() if name.endswith(OWN)) if self.shares() else whole
        return {
            "shared": whole - own, "of a class": own // len(self.areas), "rest": every - whole, "in all": every
        }  # fmt: skip

    def shares(self) -> bool:
        """Whether defects have anything of the UNet's adapters in common."""
        return self.scope != "defect"

    def _encode(self, images: Tensor, name: str) -> Tensor:
        """Latents of the pictures of this name."""
        return self.backbone.encode(images)

    def dual(self, defect: str) -> Dual:
        """The model of a defect; one at a time is held, the others' trained weights lie beside it."""
        if self._dual is None:
            self._dual = self.untrained(0).requires_grad_(False)
        if self._holds != defect:
            self._dual.load_trained(self.states[self.group(defect)], self.classes(defect))
            self._holds = defect
        return self._dual

    @torch.no_grad()
    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """Draw pairs; one whose mask has a flaw is drawn again, up to ``attempts`` drawings.

        A sample's notes say at which threshold its mask was cut and what set it, at which drawing it was kept, for
        which flaws others were not, and the flaw that it was kept with where there was no drawing left.

        Raises:
            ValueError: A request asks for a defect that was not learned, or compensation has no background to read.
        """
        for request in requests:
            if (name := self.name_of(request)) not in self.areas:
                known = ", ".join(self.areas) or "nothing"
                raise ValueError(f"{self.title} was fitted on {known}, not on '{name}'")
            if self.config.compensation and foreground(request.normal).all():
                raise ValueError(
                    f"the normal image of request {request.seed} shows no background that compensation could read: "
                    "leave the image out, or set compensation to false"
                )
        drawn: dict[int, Sample] = {}
        before: dict[int, list[str]] = {i: [] for i in range(len(requests))}
        for attempt in range(self.config.attempts):
            left = [i for i in range(len(requests)) if i not in drawn or drawn[i].notes["flaw"]]
            for i in left if attempt else []:
                before[i].append(drawn[i].notes["flaw"])
            for defect in dict.fromkeys(self.name_of(requests[i]) for i in left):
                own = [i for i in left if self.name_of(requests[i]) == defect]
                for start in range(0, len(own), self.config.batch_size):
                    part = own[start : start + self.config.batch_size]
                    drawn |= zip(part, self._draw([requests[i] for i in part], attempt), strict=True)
        for i, flawed in before.items():
            drawn[i].notes["redrawn_for"] = "; ".join(flawed)
        return [drawn[i] for i in range(len(requests))]

    def _draw(self, requests: Sequence[Request], attempt: int) -> list[Sample]:
        """Up to ``batch_size`` pairs of one defect."""
        images, parts = self.denoised(requests, attempt)
        samples = []
        for image, part, r in zip(images, parts, requests, strict=True):
            cut = extract(part, self.config.floor, tint=self.config.tint)
            notes = {"threshold": round(cut.threshold, 4), "threshold_by": cut.by, "tint": round(cut.tint, 4)}
            notes["drawing"] = attempt + 1
            notes["flaw"] = self._flaw(cut.mask, self.name_of(r))
            samples.append(Sample(image, cut.mask, r.category, r.defect, r.seed, r.group, notes, part))
        return samples

    def _flaw(self, mask: Tensor, defect: str) -> str:
        """What is wrong with a drawn mask; "" for a good one."""
        return "full" if mask.all() else next(iter(flaws(mask, torch.ones_like(mask), self.areas[defect])), "")

    def denoised(self, requests: Sequence[Request], attempt: int = 0, hooks: Sequence = ()) -> tuple[Tensor, Tensor]:
        """Images and parts (N, 3, H, W) of up to ``batch_size`` requests of one defect; hooks see the batch padded."""
        config, base, dual = self.config, self.backbone, self.dual(self.name_of(requests[0]))
        padded = [*requests, *[requests[-1]] * (config.batch_size - len(requests))]
        shape = base.latent_shape(padded[0].normal.shape[-1])
        seeds = [noise_seed(request.seed, branch, attempt) for branch in (IMAGE, PART) for request in padded]
        start = noise_like(seeds, shape).to(base.device)
        n, guided = len(padded), config.guidance_scale > 1
        *words, nothing = dual.text()
        kinds = [(nothing, word) if guided else (word,) for word in words]
        text = torch.stack([word for kind in kinds for word in kind]).repeat_interleave(n, 0)
        backgrounds, of_row = self._backgrounds(padded) if config.compensation else (torch.empty(0), [])
        background_noise = noise_like([noise_seed(0, BACKGROUND)], shape).to(base.device)

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            copies = 2 if guided else 1
            noisy = torch.cat([branch for branch in latents.chunk(2) for _ in range(copies)])
            features = None
            if config.compensation:
                # Each by itself, so that a sample does not depend on how many others share the call.
                levels = [base.scheduler.add_noise(x[None], background_noise, timestep[None]) for x in backgrounds]
                seen = [dual.branches.background_features(x, timestep, base.embed([""])) for x in levels]
                features = [torch.cat(layer)[of_row] for layer in zip(*seen, strict=True)]
            predicted = dual.branches(noisy, timestep, text, features)
            if not guided:
                return predicted
            without, with_text = predicted.unflatten(0, (2, 2, n)).unbind(1)
            return (without + config.guidance_scale * (with_text - without)).flatten(0, 1)

        final = denoise(predict, start, base.scheduler, config.num_inference_steps, hooks)
        images, parts = base.decode(final).chunk(2)
        return images[: len(requests)], parts[: len(requests)]

    def _backgrounds(self, requests: Sequence[Request]) -> tuple[Tensor, list[int]]:
        """Latents of the distinct backgrounds of a batch, and which of them each request has."""
        keys = [request.normal.numpy().tobytes() for request in requests]
        distinct = {key: request.normal for key, request in zip(keys, requests, strict=True)}
        order = list(distinct)
        latents = [self._encode(background(normal)[None], "background") for normal in distinct.values()]
        return torch.cat(latents), [order.index(key) for key in keys]

    def _drawn_by(self, group: str) -> list[str]:
        """The defects of a group in the order of its classes."""
        return [defect for defect in self.areas if self.group(defect) == group]

    def save(self, folder: Path) -> None:
        """What was trained, a file a group, and the configuration."""
        for group, state in self.states.items():
            told = {DEFECTS: json.dumps(self._drawn_by(group))}
            paths.write_bytes(folder / f"{group}.safetensors", safetensors.torch.save(state, told))
        described = {
            "config": self.config.model_dump(),
            "backbone": self.backbone.digest,
            "curves": self.curves,
            "areas": self.areas,
        }
        paths.write_text(folder / "method.json", json.dumps(described, indent=1))
        shutil.rmtree(folder / ENDED, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path, backbone: Backbone | None = None) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: It was fitted on another base model, on other defects, or with another rank or other parts.
        """
        described = json.loads((folder / "method.json").read_text())
        method = cls(cls.Config(**described["config"]), backbone)
        require_fitted_on(described["backbone"], backbone, folder)
        method.areas = {defect: tuple(ends) for defect, ends in described["areas"].items()}
        method._dual = method.untrained(0).requires_grad_(False)
        for group, curve in described["curves"].items():
            file = folder / f"{group}.safetensors"
            with safetensors.safe_open(file, "pt") as held:
                told = json.loads((held.metadata() or {}).get(DEFECTS, "null"))
                method.states[group] = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
            if told != (wanted := method._drawn_by(group)):
                raise ValueError(
                    f"{file} was fitted on {', '.join(told or ['defects that it does not name'])}, not on "
                    f"{', '.join(wanted)}: fit it anew"
                )
            method.curves[group] = [tuple(point) for point in curve]
            method._dual.expect(method.states[group], file)
        return method


def _taught(shot: Shot) -> bool:
    """Whether a mask can be read off a shot's part."""
    found = extract(shot.image * shot.mask, FLOOR, tint=0)
    return found.by != "border" and bool(found.mask.any())


def left_out(given: Iterable[str], read: Mapping[str, Sequence[Shot]]) -> dict[str, int]:
    """How many of the shots that were given, by the names of their defects, are not among those that can be read."""
    counts = Counter(given)
    return {defect: counts[defect] - len(own) for defect, own in read.items()}


def area_range(shots: Sequence[Shot]) -> tuple[float, float]:
    """The least and the largest area of a defect's masks."""
    own = [area_of(shot.mask) for shot in shots]
    return min(own), max(own)


def noise_seed(seed: int, what: int, attempt: int = 0) -> int:
    """The seed of one noise of a request, 32 bits: torch's CPU generator ignores those above."""
    return int(np.random.SeedSequence([seed, what, attempt]).generate_state(1, np.uint32)[0])
