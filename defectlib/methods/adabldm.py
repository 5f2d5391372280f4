"""AdaBLDM (paper 002; arXiv 2402.19330): blended latent diffusion, told by a trimap where object and defect are.

A ControlNet reads the trimap (defect 1, object 0.5, background 0) and steers a frozen latent diffusion model. It is
trained on composites, real defects cut out and pasted on normal images, one model a category and defect. Drawing has
four stages: free diffusion; latent editing, which puts the normal image's noised latents outside the defect; image
editing, which does so in pixels; and the adaptation of a decoder to the one image that it has to decode (``decoder``).

Only the abstract and the released code (GrandpaXun242/AdaBLDM, without a licence: nothing is copied from it) can be
read, and a summary of the paper. Where they differ, :meth:`AdaBLDMConfig.as_released` names the code, but for the last
rows, which are never followed:

====================  ============================================  ========================================
what                  here                                          released
====================  ============================================  ========================================
base model            adapted to the category's normals first (by   not adapted
                      LoRA, where the paper trains all of it)
empty prompts         one in ten while training                     none
latent editing        after 40 % to 90 % of the steps (20 of 50)    after 50 % to 90 %
noise after an edit   of the level that the loop goes on from       of the level before: too much
  in pixels
--------------------  --------------------------------------------  ----------------------------------------
composites            drawn from seeds, encoded once                20,000 files
rotated defects       keep width and height; black pixels count     swapped; black pixels are holes
defects that do not   drawn again 8 times, then cut to the object   endless retries, or silently fewer images
  fit
composites            also mirrored                                 turned and scaled
latent editing        with the noise that was started from          with fresh noise at every step
prompt for drawing    the one trained on                            with ", black background" added
few-shot images       never tested on                               also copied into the test set
====================  ============================================  ========================================
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
from diffusers import ControlNetModel
from pydantic import Field, model_validator
from torch import Tensor

from defectlib import adaptation, paths
from defectlib.augmentation import composite
from defectlib.backbone import ENCODE_BATCH, Backbone
from defectlib.control import denoising_loss, embedded_once, new_controlnet, steered
from defectlib.decoder import Part, adapted
from defectlib.diffusion import Hook, at_level, denoise, dilated, kept_outside, noise_like, to_latents
from defectlib.masks.trimap import depths_of, foreground, trimap
from defectlib.methods.base import MethodConfig, register, require_base, require_fitted_on, require_prompts
from defectlib.training import ENDED, Curve, FitSettings, State, digest, fit, once
from defectlib.types import Request, Sample, Shot


class AdaBLDMConfig(MethodConfig):
    """The paper's values are the defaults; its ablations are the stages, each of which can be left out.

    Attributes:
        composites: How many a defect there are to learn from; each is a function of the fit's seed and its number.
        epochs: Passes over them; ``steps`` replaces them where it is given.
        schedule: Of the learning rate: constant as in the paper, or a cosine to zero, for short fits at a high rate.
        empty_prompt: Share of the training rows whose prompt is empty, for guidance. The ControlNet's always is.
        hint: What the ControlNet reads: the trimap, or as an ablation the defect's mask alone.
        placement: Composites hold defects anywhere on the object, or as deep inside it as the shots' are. Where the
            masks that are drawn for lie is their source's to say (``affine``, ``affine_as_shots``).
        mask_weight: Added to the loss's weight of 1 inside the defect; the paper has none.
        adapt_steps: Steps by which the base model is first adapted to the normal images, as LoRA (``adaptation``). The
            paper does so and gives no number; 1,000 is ours.
        latent_from: Share of the steps after which latent editing begins.
        image_from: Share of the steps after which image editing takes its place. 20, 25 and 5 of 50 steps are the
            paper's three stages.
        latent_editing: With the second stage.
        image_editing: With the third stage.
        renoise: Noise after image editing is that of the step that follows, or of the one that was made (released).
        dilation: Reach of the mask of latent editing beyond the defect, as a share of the latents' side; 2 cells of 32
            are the released code's.
        decoder: What the last stage trains, see ``decoder.adapted``; None leaves it out.
        decoder_steps: Of that stage, an image; so are the next two.
        batch_size: Requests a call of the model; short batches are padded, so that a sample depends on itself alone.
            At most what the VAE takes at once.
    """

    DRAWING: ClassVar[tuple[str, ...]] = (
        *("num_inference_steps", "guidance_scale", "controlnet_scale", "latent_from", "image_from", "latent_editing"),
        *("image_editing", "renoise", "dilation", "batch_size"),
        *("decoder", "decoder_steps", "decoder_learning_rate", "decoder_schedule"),
    )

    composites: int = Field(20_000, ge=1)
    epochs: int = Field(10, ge=1)
    steps: int | None = Field(None, ge=1)
    train_batch_size: int = Field(4, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    empty_prompt: float = Field(0.1, ge=0, lt=1)
    hint: Literal["trimap", "mask"] = "trimap"
    placement: Literal["anywhere", "as_shots"] = "anywhere"
    mask_weight: float = Field(0.0, ge=0)
    precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    adapt_steps: int = Field(1000, ge=0)
    adapt_rank: int = Field(16, ge=1)
    adapt_learning_rate: float = Field(1e-4, gt=0)
    num_inference_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(9.0, ge=1)
    controlnet_scale: float = Field(1.0, ge=0)
    latent_from: float = Field(0.4, ge=0, le=1)
    image_from: float = Field(0.9, ge=0, le=1)
    latent_editing: bool = True
    image_editing: bool = True
    renoise: Literal["next", "current"] = "next"
    dilation: float = Field(0.0625, ge=0, le=1)
    decoder: Part | None = "whole"
    decoder_steps: int = Field(200, ge=1)
    decoder_learning_rate: float = Field(1e-4, gt=0)
    decoder_schedule: Literal["constant", "cycle"] = "constant"
    batch_size: int = Field(4, ge=1, le=ENCODE_BATCH)

    @model_validator(mode="after")
    def _in_order(self) -> AdaBLDMConfig:
        """Stages follow each other."""
        if self.latent_from > self.image_from:
            raise ValueError(f"latent_from {self.latent_from} must not be after image_from {self.image_from}")
        return self

    @classmethod
    def as_released(cls, **changes) -> AdaBLDMConfig:
        """The released code's values, where they differ from the paper's."""
        return cls(**{"adapt_steps": 0, "empty_prompt": 0.0, "latent_from": 0.5, "renoise": "current"} | changes)

    def stage(self, done: float) -> Literal["free", "latent", "image"]:
        """Which stage edits after this share of the steps; a share that is a boundary belongs to the stage before it.

        Of 50 steps the first 20 are followed by no edit, 25 by one of latents, 5 by one of the image.
        """
        if done > self.image_from + 1e-9 and self.image_editing:
            return "image"
        return "latent" if done > self.latent_from + 1e-9 and self.latent_editing else "free"

    def fit_settings(self) -> FitSettings:
        """The settings of the fit loop."""
        return FitSettings(
            steps=self.epochs * -(-self.composites // self.train_batch_size) if self.steps is None else self.steps,
            batch_size=self.train_batch_size, learning_rate=self.learning_rate, schedule=self.schedule,
            precision=self.precision,
        )  # fmt: skip


class Composites(NamedTuple):
    """What is learned from, row by row; the pictures themselves are not kept.

    Attributes:
        latents: Of the composites, (N, C, h, w).
        masks: Of the defects, packed along the last axis: uint8 (N, 1, H, W / 8).
        of_normal: Which normal image each is pasted on, (N,).
    """

    latents: Tensor
    masks: np.ndarray
    of_normal: np.ndarray


@register("adabldm")
class AdaBLDM:
    """See the module's docstring.

    ``preserves_background`` is False: after the last stage the pixels outside the mask are near the normal image's, how
    near is measured with every sample (``change_outside``).
    """

    Config = AdaBLDMConfig
    scope = "defect"
    makes_masks = False
    preserves_background = False
    needs_backbone = True
    one_normal_a_group = False

    def __init__(self, config: AdaBLDMConfig, backbone: Backbone | None = None) -> None:
        require_base(backbone, "AdaBLDM")
        self.config, self.base, self.backbone = config, backbone, backbone
        self.adapter: State = {}
        self.states: dict[str, State] = {}
        self.curves: dict[str, Curve] = {}
        self._net: ControlNetModel | None = None
        self._holds = ""

    def fit(
        self, shots: Sequence[Shot], normals: Sequence[Tensor], *, prompts: dict[str, str], seed: int, workdir: Path
    ) -> None:
        """Train a ControlNet a defect on composites; the base model is first adapted to the normals.

        Raises:
            ValueError: There is no shot or no normal image, a defect has no prompt, or a shot's mask is larger than the
                object of any normal.
        """
        if not shots:
            raise ValueError("AdaBLDM needs at least one shot of a defect to learn from")
        if not normals:
            raise ValueError("AdaBLDM pastes defects on normal images: give at least one in train/good")
        require_prompts(shots, prompts)
        self.base.latent_shape(normals[0].shape[-1])
        objects = [foreground(image) for image in normals]
        largest = max(int(found.sum()) for found in objects)
        for shot in shots:
            if shot.mask.sum() > largest:
                raise ValueError(
                    f"the mask of shot {shot.defect}/{shot.id} covers {int(shot.mask.sum())} px, more than the object "
                    f"of any normal image ({largest} px): correct the mask, or give the objects' masks as `foregrounds`"
                )
        self.states, self.curves, self._holds = {}, {}, ""
        if self.config.adapt_steps:
            self._adapt(shots[0].category, normals, seed, workdir / "adaptation")
        for defect in dict.fromkeys(shot.defect for shot in shots):
            own = [shot for shot in shots if shot.defect == defect]
            self.states[defect], self.curves[defect] = self._fit(own, normals, objects, prompts[defect], seed, workdir)

    def _adapt(self, category: str, normals: Sequence[Tensor], seed: int, folder: Path) -> None:
        """Draw from here on with a base model that has seen the category's normal images, as "a <category>"."""
        self.backbone, self.adapter = adaptation.to_normals(
            self.base, normals, category, self.config, seed=seed, folder=folder
        )

    def composite(
        self,
        number: int,
        shots: Sequence[Shot],
        normals: Sequence[Tensor],
        objects: Sequence[Tensor],
        seed: int,
    ) -> tuple[Tensor, Tensor, int]:
        """One of the training set: a function of the fit's seed and its number, for which no file is needed.

        Args:
            number: From 0 up.
            shots: Of one defect.
            normals: To paste on.
            objects: Their foregrounds, bool (1, H, W).
            seed: Of the fit.

        Returns:
            The image (3, H, W), the defect's mask (1, H, W), and which normal image it is pasted on.
        """
        rng = np.random.default_rng([seed, 11, number])
        k = int(rng.integers(len(normals)))
        depths = depths_of(tuple(shots)) if self.config.placement == "as_shots" else None
        return *composite(shots, normals[k], objects[k], rng, depths=depths), k

    def composites(
        self, shots: Sequence[Shot], normals: Sequence[Tensor], objects: Sequence[Tensor], seed: int
    ) -> Composites:
        """The training set of one defect, encoded; arguments as those of :meth:`composite`."""
        latents, masks, of_normal = [], [], []
        for start in range(0, self.config.composites, ENCODE_BATCH):
            numbers = range(start, min(start + ENCODE_BATCH, self.config.composites))
            pictures, placed, on = zip(
                *(self.composite(n, shots, normals, objects, seed) for n in numbers), strict=True
            )
            latents.append(self.backbone.encode(torch.stack(pictures)))
            masks += [np.packbits(mask.numpy(), axis=-1) for mask in placed]
            of_normal += on
        return Composites(torch.cat(latents), np.stack(masks), np.array(of_normal))

    def _fit(
        self,
        shots: Sequence[Shot],
        normals: Sequence[Tensor],
        objects: Sequence[Tensor],
        prompt: str,
        seed: int,
        workdir: Path,
    ) -> tuple[State, Curve]:
        """Train the ControlNet of one defect, or take it from where a killed run had ended it; ``save`` clears that."""
        config, base, side = self.config, self.backbone, normals[0].shape[-1]
        text, nothing = base.embed([prompt]), base.embed([""])
        grid = base.latent_shape(side)[1:]

        def train(checkpoints: Path) -> tuple[State, Curve]:
            learned = self.composites(shots, normals, objects, seed)
            net = new_controlnet(base, seed)

            def loss(items: Tensor, generator: torch.Generator) -> Tensor:
                unpacked = np.unpackbits(learned.masks[items.numpy()], axis=-1, count=side)
                masks = torch.from_numpy(unpacked.astype(bool))
                hints = self._hints(masks, [objects[k] for k in learned.of_normal[items.numpy()]])
                weights = 1 + config.mask_weight * to_latents(masks, grid).float().to(base.device)
                silent = (torch.rand(len(items), 1, 1, generator=generator) < config.empty_prompt).to(base.device)
                return denoising_loss(
                    net, base, learned.latents[items], torch.where(silent, nothing, text), hints, weights, generator,
                    control_text=nothing.expand(len(items), -1, -1),
                )  # fmt: skip

            try:
                if config.gradient_checkpointing:
                    net.enable_gradient_checkpointing()
                    base.unet.enable_gradient_checkpointing()  # gradients pass through the frozen decoder too
                curve = fit(net, loss, config.composites, config.fit_settings(), seed=seed, folder=checkpoints)
            finally:
                base.unet.disable_gradient_checkpointing()  # others draw with this base model
            return {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}, curve

        given = digest([x for shot in shots for x in (shot.image, shot.mask)] + [*normals, *objects])
        depths = depths_of(tuple(shots)) if config.placement == "as_shots" else None
        asked = [self.base.digest, config.fit_values(), given, prompt, depths, seed]
        return once(workdir / ENDED / f"{shots[0].defect}.safetensors", asked, train)

    def _hints(self, masks: Tensor, objects: Sequence[Tensor]) -> Tensor:
        """What the ControlNet reads, float32 (N, 3, H, W) in [0, 1]."""
        plain = masks.float()
        if self.config.hint == "trimap":
            plain = torch.stack([trimap(mask, found) for mask, found in zip(masks, objects, strict=True)])
        return plain.expand(-1, 3, -1, -1).to(self.backbone.device)

    def net(self, defect: str) -> ControlNetModel:
        """The ControlNet of a defect; one at a time is held, the others' weights lie beside it."""
        if self._net is None:
            self._net = new_controlnet(self.backbone, 0).eval().requires_grad_(False)
        if self._holds != defect:
            self._net.load_state_dict(self.states[defect])
            self._holds = defect
        return self._net

    @torch.no_grad()
    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """Draw the requests; the masks are those of the requests.

        Raises:
            ValueError: A request has no mask, one larger than its object, or a defect that was not learned.
        """
        for request in requests:
            self._check(request)
        drawn: dict[int, Tensor] = {}
        size = self.config.batch_size
        for defect in dict.fromkeys(request.defect for request in requests):
            own = [i for i, request in enumerate(requests) if request.defect == defect]
            for part in (own[start : start + size] for start in range(0, len(own), size)):
                drawn |= zip(part, self._draw([requests[i] for i in part]), strict=True)
        return [Sample(drawn[i], r.mask, r.category, r.defect, r.seed, r.group) for i, r in enumerate(requests)]

    def _check(self, request: Request) -> None:
        if request.defect not in self.states:
            known = ", ".join(self.states) or "nothing"
            raise ValueError(f"AdaBLDM was fitted on {known}, not on '{request.defect}'")
        if request.mask is None or not request.mask.any():
            raise ValueError(f"request {request.seed} has no mask or an all-black one: AdaBLDM draws inside a mask")
        wanted, there = int(request.mask.sum()), int(foreground(request.normal).sum())
        if wanted > there:
            raise ValueError(
                f"the mask of request {request.seed} covers {wanted} px, more than the object of its normal image "
                f"({there} px): draw a smaller mask, or give the objects' masks as `foregrounds`"
            )

    def _draw(self, requests: Sequence[Request]) -> Tensor:
        """Images (N, 3, H, W) of up to ``batch_size`` requests of one defect, all four stages."""
        config = self.config
        padded = self._padded(requests)
        latents = self.denoised(padded)
        if config.decoder is None:
            return self.backbone.decode(latents)[: len(requests)]
        normals, masks = (torch.stack([getattr(r, part) for r in padded]) for part in ("normal", "mask"))
        images = adapted(
            self.backbone, *(x[: self._adapted_rows(len(requests))] for x in (latents, normals, masks)),
            part=config.decoder, steps=config.decoder_steps, learning_rate=config.decoder_learning_rate,
            schedule=config.decoder_schedule,
        )  # fmt: skip
        return images[: len(requests)]

    def _adapted_rows(self, wanted: int) -> int:
        """On a GPU the padding is adapted too, so that a batch is always as large; else each image is alone."""
        return self.config.batch_size if self.backbone.device.type == "cuda" else wanted

    def _padded(self, requests: Sequence[Request]) -> list[Request]:
        return [*requests, *[requests[-1]] * (self.config.batch_size - len(requests))]

    @torch.no_grad()
    def denoised(self, requests: Sequence[Request], hooks: Sequence[Hook] = ()) -> Tensor:
        """z_0 of up to ``batch_size`` requests of one defect, padded to a batch: the first three stages.

        Args:
            requests: Of one defect.
            hooks: Called after the stages' own, see ``diffusion.denoise``.
        """
        config, base, net = self.config, self.backbone, self.net(requests[0].defect)
        requests = self._padded(requests)
        shape = base.latent_shape(requests[0].normal.shape[-1])
        images, masks = (torch.stack([getattr(r, part) for r in requests]) for part in ("normal", "mask"))
        seeds = [r.seed for r in requests]
        noise = noise_like(seeds, shape).to(base.device)
        hint = self._hints(masks, [foreground(r.normal) for r in requests])
        prompts = [r.prompt for r in requests]
        nothing, text = base.embed([""] * len(prompts)), base.embed(prompts)
        if config.guidance_scale > 1:
            nothing, text, hint = torch.cat([nothing] * 2), torch.cat([nothing, text]), torch.cat([hint] * 2)

        stages = [self._latent_editing(images, masks, noise), self._image_editing(images, masks, seeds)]
        with embedded_once(net, hint) as embedded:
            predict = steered(
                net, base, text, embedded, control_text=nothing,
                guidance_scale=config.guidance_scale, controlnet_scale=config.controlnet_scale,
            )  # fmt: skip
            return denoise(predict, noise, base.scheduler, config.num_inference_steps, [*stages, *hooks])

    def _latent_editing(self, normals: Tensor, masks: Tensor, noise: Tensor) -> Hook:
        """The second stage: outside the dilated defect the normal's latents, with the noise that was started from."""
        config, base = self.config, self.backbone
        normal = base.encode(normals)
        cells = to_latents(masks, tuple(normal.shape[2:])).to(base.device)
        inside = dilated(cells, round(config.dilation * normal.shape[-1]))
        edit = kept_outside(inside, normal, noise, base.scheduler)
        return lambda done, latents, x0: edit(done, latents, x0) if config.stage(done) == "latent" else latents

    def _image_editing(self, normals: Tensor, masks: Tensor, seeds: Sequence[int]) -> Hook:
        """The third stage: what is decoded gets the normal's pixels outside the defect, and noise of its own anew."""
        config, base = self.config, self.backbone

        def edit(done: float, latents: Tensor, x0: Tensor) -> Tensor:
            if config.stage(done) != "image":
                return latents
            edited = base.encode(torch.where(masks, base.decode(x0), normals))
            level = done if config.renoise == "next" else done - 1 / config.num_inference_steps
            at = round(level * config.num_inference_steps)
            fresh = noise_like([_edit_seed(seed, at) for seed in seeds], edited.shape[1:]).to(base.device)
            return at_level(edited, fresh, base.scheduler, level)

        return edit

    def save(self, folder: Path) -> None:
        """A ControlNet a defect in diffusers' layout, the base's adapter, and the configuration."""
        for defect in self.states:
            self.net(defect).save_pretrained(folder / "controlnet" / defect, safe_serialization=True)
        adaptation.write(self.adapter, folder)
        described = {"config": self.config.model_dump(), "backbone": self.base.digest, "curves": self.curves}
        paths.write_text(folder / "method.json", json.dumps(described, indent=1))
        for done in (ENDED, "adaptation"):
            shutil.rmtree(folder / done, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path, backbone: Backbone | None = None) -> AdaBLDM:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: It was fitted on another base model.
        """
        described = json.loads((folder / "method.json").read_text())
        method = cls(cls.Config(**described["config"]), backbone)
        require_fitted_on(described["backbone"], backbone, folder)
        method.backbone, method.adapter = adaptation.read(folder, backbone, method.config)
        for defect, curve in described["curves"].items():
            file = folder / "controlnet" / defect / "diffusion_pytorch_model.safetensors"
            method.states[defect] = safetensors.torch.load_file(file)
            method.curves[defect] = [tuple(point) for point in curve]
        return method


def _edit_seed(seed: int, step: int) -> int:
    """The seed of the noise after an edit of the image, 32 bits: torch's CPU generator ignores those above."""
    return int(np.random.SeedSequence([seed, 13, step]).generate_state(1, np.uint32)[0])
