"""DefectSynth, stage 2 (paper 001; TASE 2026): a ControlNet tells a frozen latent diffusion model where the defect is.

Trained on (mask, prompt, real defect image) with the base model's own loss; drawn on a normal image by deterministic
DDIM, with the normal's noised latents outside the mask. Two ideas of the paper are added while drawing:
Selective Attention Enhancement (Equations 5-8, ``attention``) and Similarity-Based Feature Fusion (Equation 9,
``fusion``). Masks come from ``masks`` (stage 1).

Where the released code (INDTLab/DefectSynth c7bed91) differs, :meth:`DefectSynthConfig.as_released` names it:

===================  ==============================  ==========================================
what                 here                            released
===================  ==============================  ==========================================
sampler              20 steps, eta 0                 50 steps, eta 1
blending mask        up to 1/8 of the side wider      up to 1/4
background, eta 1    noised alike at every step      noised anew at every step
background, the end  pasted outside the mask         blended before each prediction only (not copied)
blending             a hard mask                     a soft, resampled one (not copied)
prompts              as given                        with ", best quality" (not copied)
masks (stage 1)      above mid-grey, no specks       a grey of 50, no pieces below 50 px of 512 x 512 (not copied)
SAE weights          Equation 7, cut at 2            min-max of the difference + 1
SFF                  dot product, weights sum to 1    cosine, 0.7 + 0.3 each other sample; a no-op in a group of 2
SFF's positions      inside the mask, as released     inside the mask (Eq. 9 as printed has none: ``sff_within``)
alignment            every shift, 120 angles          25 shifts and 6 angles, at 512 px (not copied: never better)
colours              as decoded                      one histogram over all channels, the normal image's
value range          [-1, 1] throughout              trained in [-1, 1], sampled from images in [0, 1] (not copied)
===================  ==============================  ==========================================

The paper's "cosine noise schedule" cannot be meant: the frozen base model has its own, which is kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from diffusers import ControlNetModel
from pydantic import Field
from skimage.exposure import match_histograms
from torch import Tensor

from defectlib import adaptation, paths
from defectlib.attention import AttentionWeights, reweighted, selective_weights
from defectlib.augmentation import training_pictures
from defectlib.backbone import ENCODE_BATCH, Backbone
from defectlib.control import denoising_loss, embedded_once, new_controlnet, steered
from defectlib.diffusion import at_level, denoise, dilated, noise_like, reach, to_latents
from defectlib.fusion import fuse
from defectlib.masks import alignment
from defectlib.methods.base import (
    MethodConfig,
    load_shots,
    register,
    require_base,
    require_fitted_on,
    require_prompts,
    save_shots,
)
from defectlib.training import ENDED, Curve, FitSettings, State, digest, fit, once
from defectlib.types import Request, Sample, Shot

# Keeps the positions that a group's fusion draws apart from the noise of its first sample, whose seed names the group.
POSITIONS = 0xF05E
RELEASED_REFERENCE = 0.3


class DefectSynthConfig(MethodConfig):
    """The paper's values are the defaults but for SAE's form and SFF's reach; its ablations are ``sae`` and ``sff``.

    Where the paper is silent the fit loop's own values hold: gradients are clipped to norm 1 (``training``).

    Attributes:
        epochs: Passes over the shots; ``steps`` replaces them where it is given: of a defect, so that one ControlNet
            for several trains that often for each. After 0 steps the ControlNet has no effect, and the base model draws
            by itself (zero-shot).
        schedule: Of the learning rate: constant as in the paper, or a cosine to zero, for short fits at a high rate.
        flips: Also train on every shot mirrored both ways and turned by half; the paper has no augmentation.
        crops: Random square windows of each shot to train on besides the whole, where a thin mask meets the latents'
            cells in other ways; the paper has none.
        mask_weight: Added to the loss's weight of 1 inside the mask; the paper has none.
        adapt_steps: Steps by which the base model is first adapted to the normal images (see ``adaptation``); the paper
            has none.
        dilation: Reach of the blending mask beyond the mask at t = T, as a share of the latents' side; it falls to
            none at t = 0. The paper gives none; 8 cells of 64 are the released code's at 20 steps, 16 at its own 50.
        guidance_scale: 1 is no classifier-free guidance, as released.
        batch_size: Requests a call of the model; short batches are padded, so that a sample depends on itself alone.
            At most what the VAE takes at once.
        sae_softmax: Equation 7's softmax over the mask's pixels, or over all as printed.
        sae_cap: Largest weight: 2 is the released code's range. None leaves the tail of Equation 7, whose largest
            weight is 80 to 100 on Stable Diffusion's 64 x 64 cells (``04_methods`` simulates it) and a few on the
            16 x 16 of ``tiny``. There ``04_methods`` counts no damage in either form: the limit is a precaution for
            the larger grid, no finding, and no small one: there the mean inside the mask falls from 2 to 1.26.
        sff_base_weight: w_i of the sample whose turn it is, w_j of the others share the rest equally: Equation 9's
            weights are read as of roles, not of samples by number.
        sff_within: Fuse features inside the mask, which is the released code's form (Section III-E speaks of "the
            generated defective regions"), or anywhere, as Equation 9 is printed: that changes the background too.
    """

    DRAWING: ClassVar[tuple[str, ...]] = (
        *("num_inference_steps", "eta", "controlnet_scale", "guidance_scale", "dilation", "batch_size"),
        *("sae", "sae_form", "sae_softmax", "sae_cap"),
        *("sff", "sff_rate", "sff_base_weight", "sff_within", "sff_form", "match_colours"),
    )

    epochs: int = Field(2000, ge=1)
    steps: int | None = Field(None, ge=0)
    train_batch_size: int = Field(2, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    flips: bool = False
    crops: int = Field(0, ge=0)
    mask_weight: float = Field(0.0, ge=0)
    precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    ema: float | None = Field(None, gt=0, lt=1)
    adapt_steps: int = Field(0, ge=0)
    adapt_rank: int = Field(16, ge=1)
    adapt_learning_rate: float = Field(1e-4, gt=0)
    num_inference_steps: int = Field(20, ge=1)
    eta: float = Field(0.0, ge=0, le=1)
    controlnet_scale: float = Field(1.0, ge=0)
    guidance_scale: float = Field(1.0, ge=1)
    dilation: float = Field(0.125, ge=0, le=1)
    batch_size: int = Field(4, ge=1, le=ENCODE_BATCH)
    sae: bool = True
    sae_form: Literal["paper", "released"] = "paper"
    sae_softmax: Literal["mask", "image"] = "mask"
    sae_cap: float | None = Field(2.0, ge=1)
    sff: bool = True
    sff_rate: float = Field(0.2, ge=0, le=1)
    sff_base_weight: float = Field(0.7, ge=0, le=1)
    sff_within: Literal["mask", "image"] = "mask"
    sff_form: Literal["paper", "released"] = "paper"
    match_colours: bool = False

    @classmethod
    def as_released(cls, **changes) -> DefectSynthConfig:
        """The released code's values, where they differ from the paper's."""
        released = {
            "num_inference_steps": 50, "eta": 1.0, "sae_form": "released", "sff_form": "released",
            "sff_within": "mask", "match_colours": True, "dilation": 0.25, "batch_size": 2,
        }  # fmt: skip
        return cls(**released | changes)

    def fit_settings(self, n_items: int, n_defects: int) -> FitSettings:
        """The settings of the fit loop for this many training items of this many defects."""
        passes = self.epochs * -(-n_items // self.train_batch_size)
        return FitSettings(
            steps=passes if self.steps is None else self.steps * n_defects,
            batch_size=self.train_batch_size, learning_rate=self.learning_rate, schedule=self.schedule,
            precision=self.precision, ema=self.ema,
        )  # fmt: skip


@register("defectsynth")
class DefectSynth:
    """See the module's docstring.

    ``preserves_background`` is False: outside the cells that the mask touches, the latents end as the normal's own
    (unless ``sff_within`` is "image"), so the pixels there are the VAE's reconstruction of the normal image. What is
    drawn may reach one cell beyond the mask, 4 px for ``tiny`` and 8 for Stable Diffusion, and the decoder carries some
    of it further: its convolutions to neighbours, its group norms and, in Stable Diffusion, its attention to all.
    """

    Config = DefectSynthConfig
    scope = "category"
    makes_masks = False
    preserves_background = False
    needs_backbone = True
    one_normal_a_group = False

    def __init__(self, config: DefectSynthConfig, backbone: Backbone | None = None) -> None:
        require_base(backbone, "DefectSynth")
        self.config, self.base, self.backbone = config, backbone, backbone
        self.adapter: State = {}
        self.shots: list[Shot] = []
        self.curve: Curve = []
        self.controlnet: ControlNetModel | None = None
        self._latents: dict[tuple[str, str], Tensor] = {}

    def fit(
        self, shots: Sequence[Shot], normals: Sequence[Tensor], *, prompts: dict[str, str], seed: int, workdir: Path
    ) -> None:
        """Train the ControlNet alone; latents and text embeddings are computed once.

        Raises:
            ValueError: There is no shot, or a defect has no prompt.
        """
        if not shots:
            raise ValueError("DefectSynth needs at least one shot of a defect to learn from")
        require_prompts(shots, prompts)
        config, self.shots, self._latents = self.config, list(shots), {}
        if config.adapt_steps:
            self._adapt(normals, seed, workdir / "adaptation")
        base = self.backbone
        pictures = training_pictures(shots, seed, flips=config.flips, crops=config.crops)
        images, masks = pictures.shown["image"], pictures.masks
        text = base.embed([prompts[shots[i].defect] for i in pictures.of_shot])
        base.latent_shape(images.shape[-1])
        latents, hints = base.encode(images), masks.float().expand(-1, 3, -1, -1).to(base.device)
        weights = 1 + config.mask_weight * to_latents(masks, tuple(latents.shape[2:])).float().to(base.device)
        net, self.curve = new_controlnet(base, seed), []

        def loss(items: Tensor, generator: torch.Generator) -> Tensor:
            return denoising_loss(net, base, latents[items], text[items], hints[items], weights[items], generator)

        def train(checkpoints: Path) -> tuple[State, Curve]:
            settings = config.fit_settings(len(latents), len({shot.defect for shot in shots}))
            try:
                if config.gradient_checkpointing:
                    net.enable_gradient_checkpointing()
                    base.unet.enable_gradient_checkpointing()  # gradients pass through the frozen decoder too
                curve = fit(net, loss, len(latents), settings, seed=seed, folder=checkpoints)
            finally:
                base.unet.disable_gradient_checkpointing()  # others draw with this base model
            return {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}, curve

        if config.steps != 0:
            given = digest([latents.cpu(), text.cpu(), masks, weights.cpu()])
            asked = [base.digest, config.fit_values(), given, seed]
            state, self.curve = once(workdir / ENDED / "controlnet.safetensors", asked, train)
            net.load_state_dict(state)
        self.controlnet = net.eval().requires_grad_(False)

    def _adapt(self, normals: Sequence[Tensor], seed: int, folder: Path) -> None:
        """Draw from here on with a base model that has seen the category's normal images, as "a <category>"."""
        if not normals:
            raise ValueError("adapt_steps is given, but there is no normal image to adapt the base model to")
        self.backbone, self.adapter = adaptation.to_normals(
            self.base, normals, self.shots[0].category, self.config, seed=seed, folder=folder
        )

    @torch.no_grad()
    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """Draw the requests, group by group; the masks are those of the requests.

        Raises:
            ValueError: A request has no mask or an empty one, or asks for a defect that was not learned.
        """
        for request in requests:
            self._check(request)
        groups: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request.group, []).append(i)
        size = self.config.batch_size
        latents = torch.cat([self._denoise(requests[i : i + size]) for i in range(0, len(requests), size)])
        if self.config.sff:
            for group, members in groups.items():
                latents[members] = self._fused(latents[members], [requests[i] for i in members], group)
        drawn = torch.cat([self._decode(part) for part in latents.split(size)])
        if self.config.match_colours:
            drawn = torch.stack([_matched(x, request.normal) for x, request in zip(drawn, requests, strict=True)])
        return [
            Sample(image, r.mask, r.category, r.defect, r.seed, r.group)
            for image, r in zip(drawn, requests, strict=True)
        ]

    def _decode(self, latents: Tensor) -> Tensor:
        """Images of up to ``batch_size`` latents, by a full batch: another batch size may move a pixel's last bit."""
        padding = latents[-1:].expand(self.config.batch_size - len(latents), -1, -1, -1)
        return self.backbone.decode(torch.cat([latents, padding]))[: len(latents)]

    def _check(self, request: Request) -> None:
        if self.controlnet is None:
            raise ValueError("DefectSynth is not fitted: call fit or load first")
        known = sorted({shot.defect for shot in self.shots})
        if request.defect not in known:
            raise ValueError(f"DefectSynth was fitted on {', '.join(known)}, not on '{request.defect}'")
        if request.mask is None or not request.mask.any():
            raise ValueError(f"request {request.seed} has no mask or an all-black one: DefectSynth draws inside a mask")

    def _denoise(self, requests: Sequence[Request]) -> Tensor:
        """z_0 of up to ``batch_size`` requests, (N, C, h, w)."""
        config, base, wanted = self.config, self.backbone, len(requests)
        requests = [*requests, *[requests[-1]] * (config.batch_size - wanted)]
        shape = base.latent_shape(requests[0].normal.shape[-1])
        normal = base.encode(torch.stack([r.normal for r in requests]))
        pixels = torch.stack([r.mask for r in requests])
        mask = to_latents(pixels, shape[1:]).to(base.device)
        hint = pixels.float().expand(-1, 3, -1, -1).to(base.device)
        noise = noise_like([r.seed for r in requests], shape).to(base.device)
        prompts = [r.prompt for r in requests]
        text = base.embed(prompts)
        if config.guidance_scale > 1:
            text, hint = torch.cat([base.embed([""] * len(prompts)), text]), torch.cat([hint, hint])
        reference = self._references(requests, shape[1:]) if config.sae else None
        weights = AttentionWeights()

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            if reference is not None:
                weights.set(selective_weights(
                    reference, latents, mask,
                    softmax_over=config.sae_softmax, cap=config.sae_cap, form=config.sae_form,
                ))  # fmt: skip
            return steer(latents, timestep)

        def blend(done: float, latents: Tensor, x0: Tensor) -> Tensor:
            following = base.scheduler.timesteps[round(done * config.num_inference_steps) :]
            timestep = int(following[0]) if len(following) else 0
            background = at_level(normal, noise, base.scheduler, done)
            inside = dilated(mask, reach(timestep, shape[1], config.dilation))
            return torch.where(inside, latents, background)

        seeds = [r.seed for r in requests]
        base.scheduler.set_timesteps(config.num_inference_steps)
        with reweighted(base.unet, weights), embedded_once(self.controlnet, hint) as embedded:
            steer = steered(
                self.controlnet, base, text, embedded,
                guidance_scale=config.guidance_scale, controlnet_scale=config.controlnet_scale,
            )  # fmt: skip
            latents = denoise(
                predict, blend(0.0, noise, noise), base.scheduler, config.num_inference_steps, [blend],
                eta=config.eta, seeds=seeds,
            )  # fmt: skip
        return latents[:wanted]

    def _references(self, requests: Sequence[Request], size: tuple[int, int]) -> Tensor:
        """Equations 5 and 6: a real defect's latents a request, moved to where its mask overlaps the request's most."""
        aligned = []
        for request in requests:
            own = [shot for shot in self.shots if shot.defect == request.defect]
            shot = own[np.random.default_rng([request.seed, 3]).integers(len(own))]
            masks = (alignment.coverage(mask, size) for mask in (shot.mask, request.mask))
            aligned.append(alignment.apply(self._encoded(shot), alignment.align(*masks))[0])
        return torch.stack(aligned)

    def _encoded(self, shot: Shot) -> Tensor:
        key = (shot.defect, shot.id)
        if key not in self._latents:
            self._latents[key] = self.backbone.encode(shot.image[None])[0]
        return self._latents[key]

    def _fused(self, latents: Tensor, requests: Sequence[Request], group: int) -> Tensor:
        """Equation 9 over the samples of one group."""
        config = self.config
        masks = to_latents(torch.stack([r.mask for r in requests]), tuple(latents.shape[2:])).to(latents.device)
        form: dict = {}
        if config.sff_form == "released":
            if len(latents) == 2:  # there the released code matches a sample with itself, and nothing changes
                return latents
            form = {"neighbours": "simultaneous", "similarity": "cosine", "reference_weight": RELEASED_REFERENCE}
        return fuse(
            latents, torch.Generator().manual_seed(group ^ POSITIONS), rate=config.sff_rate,
            base_weight=config.sff_base_weight, masks=masks if config.sff_within == "mask" else None, **form,
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """The ControlNet and the shots (Equation 5's references) as safetensors, configuration and names as JSON."""
        self.controlnet.save_pretrained(folder / "controlnet", safe_serialization=True)
        adaptation.write(self.adapter, folder)
        described = {
            "config": self.config.model_dump(), "backbone": self.backbone.digest, "curve": self.curve,
            "shots": save_shots(self.shots, folder),
        }  # fmt: skip
        paths.write_text(folder / "method.json", json.dumps(described, indent=1))
        for done in (ENDED, "adaptation"):
            shutil.rmtree(folder / done, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path, backbone: Backbone | None = None) -> DefectSynth:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: It was fitted on another base model.
        """
        described = json.loads((folder / "method.json").read_text())
        method = cls(cls.Config(**described["config"]), backbone)
        require_fitted_on(described["backbone"], backbone, folder)
        method.backbone, method.adapter = adaptation.read(folder, backbone, method.config)
        method.shots = load_shots(folder, described["shots"])
        method.curve = [tuple(point) for point in described["curve"]]
        net = ControlNetModel.from_pretrained(folder / "controlnet", local_files_only=True)
        net = net.to(backbone.device, memory_format=torch.channels_last)
        method.controlnet = net.eval().requires_grad_(False)
        return method


def _matched(image: Tensor, normal: Tensor) -> Tensor:
    """The image with its histogram over all channels matched to the normal's, as the released code does to a batch."""
    return torch.from_numpy(match_histograms(image.numpy(), normal.numpy())).float().clamp(-1, 1)
