"""Stable Diffusion's parts by name or folder: ``tiny`` ships with the package, ``sd15`` is Stable Diffusion 1.5.

Both go through diffusers' ``from_pretrained`` on a local folder; methods see no difference but sizes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from defectlib import paths

HERE = Path(__file__).parent
WEIGHT_FILES = (
    "vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)  # fmt: skip
FILES = (
    "model_index.json", "vae/config.json", "unet/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", *WEIGHT_FILES,
)  # fmt: skip
# What a tokenizer reads where it is not one file, tokenizer.json; Stable Diffusion 1.5 has these two.
VOCABULARY = ("tokenizer/vocab.json", "tokenizer/merges.txt")
ENCODE_BATCH = 16


@dataclass(frozen=True, eq=False)
class Backbone:
    """A latent diffusion model's parts, frozen, in evaluation mode, on one device.

    Attributes:
        name: As asked for: ``tiny``, ``sd15`` or a folder.
        digest: sha256 over the sha256s of all its files (weights, configurations, vocabulary), for stage files; of one
            that ``adaptation.to_objects`` made, over its base's and its UNet's weights.
    """

    name: str
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    digest: str
    _embedded: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.unet.device

    @property
    def cell(self) -> int:
        """Pixels a latent cell covers along one side: 4 for ``tiny``, 8 for ``sd15``."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square image.

        Raises:
            ValueError: The side is no multiple of what the UNet's levels need.
        """
        multiple = self.cell * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if size % multiple:
            raise ValueError(f"image_size {size} must be a multiple of {multiple} px for the base model '{self.name}'")
        return self.vae.config.latent_channels, size // self.cell, size // self.cell

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to latents (N, C, h, w) of about unit variance: the posterior's mean."""
        parts = [self.vae.encode(part.to(self.device)).latent_dist.mean for part in images.split(ENCODE_BATCH)]
        return torch.cat(parts) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) to images (N, 3, H, W) on the CPU, clipped to [-1, 1]."""
        scaled = latents.to(self.device) / self.vae.config.scaling_factor
        return torch.cat([self.vae.decode(part).sample for part in scaled.split(ENCODE_BATCH)]).clamp(-1, 1).cpu()

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to the text encoder's last hidden states (N, L, D); each distinct prompt is encoded once, alone."""
        for prompt in dict.fromkeys(prompts):
            if prompt in self._embedded:
                continue
            with torch.autocast(self.device.type, enabled=False):  # kept for all who ask later
                self._embedded[prompt] = self.text_encoder(tokenize(self.tokenizer, [prompt]).to(self.device))[0][0]
        return torch.stack([self._embedded[prompt] for prompt in prompts])


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids (N, L), padded to the tokenizer's length.

    Raises:
        ValueError: A prompt is too long: what is cut off would not be seen, and two prompts could become one.
    """
    length = tokenizer.model_max_length
    for prompt, ids in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
        if len(ids) > length:
            raise ValueError(f"the prompt '{prompt}' has {len(ids)} tokens; the base model reads {length}: shorten it")
    return tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt").input_ids


def words(tokenizer: CLIPTokenizer, prompt: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt, each with the places (0 is the start token) of its tokens; CLIP's end a word with </w>."""
    found, tokens = [("", [])], tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)[1:-1]
    for place, token in enumerate(tokens, 1):
        found[-1] = (found[-1][0] + token.removesuffix("</w>"), [*found[-1][1], place])
        found += [("", [])] if token.endswith("</w>") else []
    return found[:-1]


@functools.cache
def known() -> dict[str, dict]:
    """The base models that have a name: where each comes from, and the sha256 of its files, at least of its weights."""
    return json.loads((HERE / "known.json").read_text())


def folder_of(name: str) -> Path:
    """The local folder of a base model.

    ``tiny`` lies in the package, ``sd15`` in ``weights/sd15`` or where DEFECTLIB_SD15 points; else a folder is meant.
    Another model of the hub is fetched into a folder first (``hf download``): a run names what it drew with by sha256,
    and a hub id may mean other files tomorrow.
    """
    if name == "tiny":
        return HERE / "tiny"
    return Path(os.environ.get("DEFECTLIB_SD15", paths.WEIGHTS / "sd15")) if name == "sd15" else Path(name)


def how_to_get(name: str) -> str:
    """The command that brings a base model here, or back."""
    entry = known().get(name, {})
    if "repository" not in entry:
        return f"bring back what was shipped: `git checkout -- {folder_of(name)}`, or install the package anew"
    patterns = " ".join(f"--include '{pattern}'" for pattern in ("*.json", "tokenizer/*", *WEIGHT_FILES))
    target = folder_of(name)
    return f"run `hf download {entry['repository']} --revision {entry['revision']} {patterns} --local-dir {target}`"


def files_of(folder: Path) -> tuple[str, ...]:
    """All files that decide what a base model draws; a tokenizer without its vocabulary would load and know no word."""
    single = "tokenizer/tokenizer.json"
    return (*FILES, *((single,) if (folder / single).is_file() else VOCABULARY))


def problem(name: str) -> str | None:
    """One sentence on what keeps a base model from being loaded (a file missing, cut off or changed), or None."""
    folder = folder_of(name)
    if name not in known() and not folder.is_dir():
        names, wanted = ", ".join(known()), f"there is no base model '{name}': give "
        fetched = (
            f"; one of the hub is fetched first: `hf download {name} --local-dir {paths.WEIGHTS / Path(name).name}`"
        )
        return f"{wanted}{names} or a folder in diffusers' layout" + (fetched if name.count("/") == 1 else "")
    remedy = how_to_get(name) if name in known() else "complete the folder (diffusers' Stable Diffusion layout)"
    missing = [file for file in files_of(folder) if not (folder / file).is_file()]
    if missing:
        by = " (DEFECTLIB_SD15 names that folder)" if name == "sd15" and "DEFECTLIB_SD15" in os.environ else ""
        return f"base model '{name}': {folder / missing[0]} is missing{by}: {remedy}"
    for file in WEIGHT_FILES:
        try:
            safe_open(folder / file, "pt")  # compares the header with the file's length, and reads no weights
        except SafetensorError:
            return f"base model '{name}': {folder / file} is cut off or no safetensors file: {remedy}"
    for file, wanted in known().get(name, {}).get("sha256", {}).items():
        if paths.sha256(folder / file) != wanted:
            return f"base model '{name}': {folder / file} is not the file of that name (its sha256 differs): {remedy}"
    return None


def digest(name: str) -> str:
    """One sha256 over those of a base model's files, in a fixed order.

    Raises:
        FileNotFoundError: It is not here, not whole, or not what it should be.
    """
    if (sentence := problem(name)) is not None:
        raise FileNotFoundError(sentence)
    folder = folder_of(name)
    return hashlib.sha256("".join(paths.sha256(folder / file) for file in files_of(folder)).encode()).hexdigest()


def default_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """A notebook's page has no use for the bars of a second's loading."""
    loud = [part for part in (diffusers_logging, transformers_logging) if part.is_progress_bar_enabled()]
    for part in loud:
        part.disable_progress_bar()
    try:
        yield
    finally:
        for part in loud:
            part.enable_progress_bar()


@functools.lru_cache(maxsize=1)
def load(name: str, device: str | None = None) -> Backbone:
    """A base model by name or folder, in float32, frozen. Nothing is downloaded.

    Args:
        name: ``tiny``, ``sd15``, or a folder in diffusers' Stable Diffusion layout.
        device: None is :func:`default_device`.

    Raises:
        FileNotFoundError: It is not here, not whole, or its sha256 differs; the sentence holds the remedy.
    """
    fingerprint = digest(name)
    with _no_progress_bars():
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder_of(name), local_files_only=True, use_safetensors=True, dtype=torch.float32,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    device = device or default_device()
    parts = [pipeline.vae, pipeline.unet, pipeline.text_encoder]
    for part in parts:
        part.to(device).eval().requires_grad_(False)
    for part in (pipeline.vae, pipeline.unet):  # the faster layout for convolutions
        part.to(memory_format=torch.channels_last)
    # The schedule is the model's own; clipping x_0 is for pixels, and Stable Diffusion's file does not ask for it.
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return Backbone(name, *parts, pipeline.tokenizer, scheduler, fingerprint)
