"""The small base model's untrained parts, its tokenizer, and the folder that they are saved to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from defectlib.backbone import WEIGHT_FILES, tokenize
from defectlib.data import world

# Twelve numbers a block keep, already as plain principal components, the grain of gravel that eight blur away.
LATENT_CHANNELS = 12
TEXT_LENGTH, TEXT_WIDTH = 48, 128
SPELT = 0.15
RARE_WORDS = ("vfx", "sks")


def new_vae(seed: int) -> AutoencoderKL:
    """The untrained autoencoder: factor 4, 64 px to (12, 16, 16)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=LATENT_CHANNELS, sample_size=world.SIZE,
            block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        )  # fmt: skip
    with torch.no_grad():  # start with a posterior so narrow that its noise hides nothing
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6
    return vae


def new_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a small vocabulary: one token a word of the world, and bytes for all other text.

    Any folder name is thus a sequence of its own; ``vfx`` and ``sks``, the rare words of dual-branch systems, are
    tokens that the world never uses.
    """
    draft = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    draft.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Bytes at the end of a word are named here, because the trainer takes those that it meets in an order of chance.
    symbols = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>", *symbols],
    )  # fmt: skip
    draft.train_from_iterator([*world.words(), *RARE_WORDS], trainer)
    parts = json.loads(draft.to_str())["model"]
    return CLIPTokenizer(parts["vocab"], [tuple(pair) for pair in parts["merges"]], model_max_length=TEXT_LENGTH)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder: two layers of width 128."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TEXT_LENGTH, projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def new_unet() -> UNet2DConditionModel:
    """The untrained UNet: heads of width 32 (``attention_head_dim`` counts heads, by a naming fault kept upstream)."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, cross_attention_dim=TEXT_WIDTH,
        block_out_channels=(64, 96, 128), attention_head_dim=(2, 3, 4), layers_per_block=1, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def new_scheduler() -> DDIMScheduler:
    """DDPM's noise schedule (Ho et al., 2020), linear beta 1e-4 to 0.02, and v-prediction (Salimans and Ho, 2022).

    So few cells show their mean tone through much noise. Stable Diffusion's schedule leaves 7 % of the signal at t = T,
    which is enough to see it, and a model that predicts noise must cancel it exactly to be rid of it: both times what
    is drawn takes its colours from the noise that it starts from, and not from the prompt.
    """
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def token_table(tokenizer: CLIPTokenizer, prompts: Sequence[str], seed: int) -> Tensor:
    """Token ids (n, L). In a share of ``SPELT`` every other word is spelt in letters, so that those are trained too."""
    ids = tokenize(tokenizer, prompts)
    rng = np.random.default_rng([seed, 11])
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for row in np.flatnonzero(rng.uniform(size=len(prompts)) < SPELT):
        pieces: list[int] = []
        for index in ids[row].tolist():
            if index in special:
                continue
            text = names[index].removesuffix("</w>")
            letters = [*text[:-1], f"{text[-1]}</w>"] if rng.uniform() < 0.5 else [names[index]]
            pieces += tokenizer.convert_tokens_to_ids(letters)
        pieces = [tokenizer.bos_token_id, *pieces[: TEXT_LENGTH - 2], tokenizer.eos_token_id]
        ids[row] = torch.tensor(pieces + [tokenizer.pad_token_id] * (TEXT_LENGTH - len(pieces)))
    return ids


def save(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer, folder: Path
) -> None:
    """Write diffusers' Stable Diffusion layout, weights as float16 safetensors."""
    modules = {"vae": vae, "unet": unet, "text_encoder": text}
    pipeline = StableDiffusionPipeline(
        **{name: module.to("cpu", torch.float16) for name, module in modules.items()}, tokenizer=tokenizer,
        scheduler=new_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    for file in WEIGHT_FILES:
        (folder / file).chmod(0o644)
