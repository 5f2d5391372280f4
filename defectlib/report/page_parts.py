"""The fixed parts of the page: its style sheet, what each picture shows, and how to read a table."""

from __future__ import annotations

from collections.abc import Sequence

from defectlib.profiles import explains

# Picture -> what it shows; its file is <picture>_<category>. The order is the order on the page.
CAPTIONS = {
    "overview": "At a glance: the first shot of every defect and each method's first sample of it, with their masks.",
    "fig_3_generated": "Real, mask, generated, as in DefectSynth Figs. 3 and 4: every defect's real images with "
    "masks, the drawn masks, and what each method drew for them.",
    "failures": "Each method's twelve samples that are farthest from every shot of their defect, by defect and the "
    "farthest first, under their masks; below them the distance.",
    "fig_1_starting_point": "The starting point, as in DefectSynth Fig. 1: normal images, and all that a method may "
    "see of each defect; red outlines are the masks.",
    "mask_area": "How large the defects are: a dot is one real mask, the bar its defect's mean; DefectSynth "
    "interpolates masks in image space left of the dashed line and in latent space right of it.",
    "symmetry": "What a defect breaks: a shot of each defect, and how it differs from itself under its own best "
    "symmetry.",
    "fig_2_mask_sources": "Where masks can come from: real ones, thresholded Perlin noise, moved real ones, and "
    "interpolation between two real ones in image and in latent space; first draws, those framed red are drawn again.",
    "fig_2_inversion": "Masks carried to noise by DDIM inversion, and back: what latent interpolation starts from.",
    "fig_2_interpolation": "From one mask to another: DefectSynth's interpolation in image space, with pixels "
    "paired in raster order and by optimal transport, and in latent space; frames in red are not kept.",
    "adabldm_fig_2_trimap": "AdaBLDM's trimap: defect white, the rest of the object grey, background black.",
    "placement": "Where a moved mask may lie on an object: its legal middles, how likely each is if defects keep to "
    "the shots' depth, and masks placed anywhere and so.",
    "adabldm_fig_1_styles": "As in AdaBLDM Fig. 1: a defect pasted, drawn by blended latent diffusion with the base "
    "model alone, and by AdaBLDM.",
    "adabldm_fig_2_network": "As in AdaBLDM Fig. 2: a noised image, the trimap, and what the base model takes it for "
    "without and with the ControlNet that reads it.",
    "adabldm_fig_3_stages": "As in AdaBLDM Fig. 3: what its latents are taken for after each stage, and without edits.",
    "adabldm_decoder": "AdaBLDM: as decoded and with the decoder adapted to the image, and the error outside the mask.",
    "adabldm_composites": "AdaBLDM: what it learns from, real defects moved and pasted, and the trimaps beside them.",
    "crop_paste_steps": "Crop-Paste, step by step.",
    "crop_paste_on_off": "Crop-Paste with its options on and off, for the same requests.",
    "defectsynth_blending": "DefectSynth: the requested mask, as hint and on the latents' grid, and how far beyond it "
    "the drawing may reach at several timesteps.",
    "defectsynth_alignment": "DefectSynth, Eqs. 5 and 6: a real defect, moved to where its mask overlaps the requested "
    "one most.",
    "defectsynth_weights": "DefectSynth, Eq. 7: the weights inside the masks at every step, with the softmax over the "
    "mask or over the image.",
    "defectsynth_weight_maps": "DefectSynth, Eq. 7: the weights as maps at several steps; black is 1, white the map's "
    "largest, logarithmic between.",
    "defectsynth_on_off": "DefectSynth with SAE and SFF on and off, and as released, for the same requests.",
    "defectsynth_fusion": "DefectSynth, Eq. 9: one group without and with SFF, and the difference.",
    "adapted_base": "The base model of the methods that draw whole images: normal images, what it draws as it ships, "
    "and once adapted to them.",
    "dualanodiff_branches": "DualAnoDiff: what its two branches see along the denoising.",
    "dualanodiff_pairs": "DualAnoDiff, as in its Fig. 5: the drawn image, its anomaly part, the part's departure from "
    "grey, the mask read off it, and the mask on the image.",
    "dualanodiff_interaction": "DualAnoDiff: the same noise with interaction (SAIM) and with it taken out.",
    "dualanodiff_attention": "DualAnoDiff, as in its Fig. 3: cross-attention to the prompts' words in both branches.",
    "fig_5_pairs": "As in DualAnoDiff Fig. 5: of every defect the first kept pair, its image, its anomaly part, the "
    "mask read off it, and the mask on the image; beside it, at which drawing it was kept and at which threshold cut.",
    "loss_curves": "The loss of every method that learns, over the steps of its fit.",
    "fig_5_ablation": "Every method with one part changed at a time, for the same seeds, beside its masks.",
    "dualanodiff_fig_4": "As in DualAnoDiff Fig. 4: a normal image, the background that is read of it, and pairs "
    "drawn by the models without and with background compensation.",
    "symmetry_aware_taken_for": "What a classifier of the shots takes the samples of each defect for, by method.",
    "symmetry_aware_similarity": "How alike the symmetry-aware system's classes are: cosines of how their coefficients "
    "depart from what all share, over all layers.",
    "symmetry_aware_between": "One pair of the symmetry-aware system, from one noise, on its way from one class to "
    "another.",
    "symmetry_aware_gates": "The symmetry-aware system's gates (TDAM) over the share of noise, by depth; dashed: the "
    "start.",
    "symmetry_aware_weights": "Where the symmetry-aware system's loss looks (SGRL): shots with outlined masks, and the "
    "weights of their cells, whose smallest and largest stand below; white is the largest, black would be none.",
    "downstream": "Downstream models trained on the shots alone and on samples, tested on held-out real images.",
    "confusion": "Which defects the classifier confuses, summed over seeds.",
    "worst_misses": "The held-out defects that the localiser found least: image, truth, prediction.",
    "quality_intervals": "Measures of quality with 95 % intervals over images, by defect and method; a bar a seed.",
    "checkpoints": "One training of the localiser, scored along the way, and what each rule would have tested.",
    "learning_curve": "Scores over the number of samples, and of shots, of each defect; as many optimiser steps each, "
    "of the seeds that the profile's curve names.",
    "symmetry_of_samples": "What a drawn defect breaks: of each source the image nearest to its median ratio, and how "
    "it differs from itself under its own best symmetry.",
    "kid_spread": "How much KID moves with the number of images: every dot is one random subset.",
    "backbone_curves": "The base model's training: the loss of the autoencoder and of the UNet.",
    "vae_round_trip": "Real defects through the base model's autoencoder and back, and the error.",
    "schedule": "The noise schedule: how much signal and noise the latents hold at each timestep.",
    "dualanodiff_fig_3_noising": "One shot, noised to several timesteps, and what the base model takes it for.",
    "denoising_loop": "The denoising loop: the predicted image along the way.",
    "zero_shot_world": "Pictures of the base model's own world, what it draws for their prompts, and without any.",
    "inversion": "Real defects inverted to noise and drawn back: plainly in few and many steps, and solved.",
    "attention_words": "Where the words of a prompt are read: cross-attention maps of the base model.",
    "dualanodiff_fig_3_attention": "As in DualAnoDiff Fig. 3: what the base model draws for the rare words of its two "
    "branches, and their cross-attention maps.",
    "zero_shot_defects": "Real defects beside what the base model draws for their prompts without any shot.",
    "closed_form_denoiser": "The best denoiser of a finite set, in closed form.",
    "memorisation": "What a perfect denoiser of a small set draws: each sample beside its nearest shot.",
}  # fmt: skip
# Drawn by the notebooks whose unit is a data set: for the first category of a batch only.
OF_FIRST_CATEGORY = frozenset({
    "fig_1_starting_point", "mask_area", "crop_paste_steps", "crop_paste_on_off", "defectsynth_blending",
    "defectsynth_alignment", "defectsynth_weights", "defectsynth_weight_maps", "defectsynth_on_off",
    "defectsynth_fusion", "dualanodiff_branches", "dualanodiff_pairs", "dualanodiff_interaction",
    "dualanodiff_attention", "adabldm_fig_1_styles", "adabldm_fig_2_network", "adabldm_fig_3_stages",
    "backbone_curves", "vae_round_trip", "schedule", "dualanodiff_fig_3_noising",
    "denoising_loop", "zero_shot_world", "inversion", "attention_words", "dualanodiff_fig_3_attention",
    "zero_shot_defects", "closed_form_denoiser", "memorisation",
})  # fmt: skip


# Drawn by 04_methods, which a batch may leave out, and where one of these methods is asked for: an earlier batch's may
# lie there.
OF_EXPLAINED = frozenset({
    "crop_paste_steps", "crop_paste_on_off", "defectsynth_blending", "defectsynth_alignment", "defectsynth_weights",
    "defectsynth_weight_maps", "defectsynth_on_off", "defectsynth_fusion", "dualanodiff_branches", "dualanodiff_pairs",
    "dualanodiff_interaction", "dualanodiff_attention", "adabldm_fig_1_styles", "adabldm_fig_2_network",
    "adabldm_fig_3_stages",
})  # fmt: skip
OF_METHODS = {
    "adabldm_decoder": ("adabldm",), "dualanodiff_fig_4": ("dualanodiff",),
    "adapted_base": ("dualanodiff", "symmetry_aware"), "symmetry_aware_taken_for": ("symmetry_aware",),
    "symmetry_aware_similarity": ("symmetry_aware",), "symmetry_aware_between": ("symmetry_aware",),
    "symmetry_aware_gates": ("symmetry_aware",), "symmetry_aware_weights": ("symmetry_aware",),
}  # fmt: skip


def captions(categories: Sequence[str], methods: Sequence[str]) -> dict[str, str]:
    """Stem -> caption of the pictures of a batch over these categories and methods, in page order."""

    def asked(picture: str) -> bool:
        if picture in OF_EXPLAINED:
            return explains(methods)
        return bool(set(OF_METHODS.get(picture, methods)) & set(methods))

    return {
        f"{picture}_{category}": f"{text.rstrip('.')} ({category})."
        for picture, text in CAPTIONS.items()
        if asked(picture)
        for category in (categories[:1] if picture in OF_FIRST_CATEGORY else categories)
    }


READING = (
    "How to read the tables: a cell that was not run is empty. <b>Reproduced</b> is a mean over seeds with its "
    "standard deviation and the number of seeds. Scores are in percent and KID is times 1,000, as the papers print "
    "them. A number's name holds its feature extractor: numbers of different extractors never share a row or a "
    "difference. ↑ higher is better, ↓ lower is better."
)

STYLE = """
:root {
  --ink: #1d2126; --soft: #5b6570; --line: #dfe3e7; --paper: #ffffff; --tint: #f5f7f9; --accent: #0b61a4;
  --mark: #fff4d6; --mark-ink: #7a4d00; --good: #e5f3ec; --good-ink: #17613f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e7ea; --soft: #9aa5b1; --line: #343b43; --paper: #15181c; --tint: #1d2227; --accent: #6bb3ee;
    --mark: #3d3113; --mark-ink: #f1cd7c; --good: #17352a; --good-ink: #8fd6b4;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main, header, footer { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 .6rem; text-wrap: balance; }
h2 {
  font-size: 1.35rem; line-height: 1.3; margin: 3rem 0 .4rem; padding-top: .6rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1.05rem; margin: 2.2rem 0 .3rem; scroll-margin-top: 1rem; }
h4 { font-size: .85rem; margin: 1.1rem 0 .35rem; color: var(--soft); font-weight: 600; }
p { max-width: 46rem; margin: .4rem 0 .8rem; }
a { color: var(--accent); }
.lead { font-size: 1.08rem; }
.note, .state, figcaption, .legend { color: var(--soft); font-size: .88rem; }
.state { display: flex; flex-wrap: wrap; gap: .4rem; margin: 1rem 0; padding: 0; list-style: none; }
.state li { background: var(--tint); border: 1px solid var(--line); border-radius: .4rem; padding: .1rem .6rem; }
.state b { color: var(--ink); font-weight: 600; }
.state .dirty { background: var(--mark); color: var(--mark-ink); border-color: transparent; }
nav { background: var(--tint); border-radius: .6rem; padding: .9rem 1.2rem; margin: 1.4rem 0; }
nav ol { columns: 2; column-gap: 2.5rem; margin: .2rem 0; padding: 0; list-style: none; font-size: .92rem; }
nav li { break-inside: avoid; padding: .12rem 0; display: flex; gap: .5rem; justify-content: space-between; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
nav strong { font-size: .8rem; color: var(--soft); font-weight: 600; }
nav .count { color: var(--soft); white-space: nowrap; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: .4rem 0 .8rem; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; white-space: nowrap; vertical-align: top; }
thead th { background: var(--tint); font-weight: 600; border-bottom: 1px solid var(--line); vertical-align: bottom; }
tbody tr + tr td { border-top: 1px solid var(--line); }
tbody tr.first td { border-top: 1px solid var(--soft); }
tbody tr:first-child td { border-top: 0; }
tbody tr:hover td { background: var(--tint); }
.n { text-align: right; }
.again { color: transparent; }
tr:hover .again { color: var(--soft); }
.ours { font-weight: 600; }
td.why { white-space: normal; min-width: 16rem; }
td.text { white-space: normal; min-width: 15rem; }
td.words { white-space: normal; min-width: 7rem; }
.code {
  display: inline-block; font-size: .74rem; line-height: 1.5; padding: 0 .4rem; margin: 0 .2rem .15rem 0;
  border-radius: .3rem; background: var(--tint); color: var(--soft); white-space: nowrap;
}
.code.dirty, .code.withheld, .code.partly_withheld { background: var(--mark); color: var(--mark-ink); }
.tag {
  font-size: .74rem; font-weight: 600; border-radius: .3rem; padding: .1rem .45rem; margin-left: .5rem;
  vertical-align: .1em;
}
.tag.ran { background: var(--good); color: var(--good-ink); }
.tag.published { background: var(--tint); color: var(--soft); }
.legend { margin: .2rem 0 .8rem; padding: 0; list-style: none; columns: 2; column-gap: 2rem; }
.legend li { break-inside: avoid; padding: .1rem 0; }
details { margin: .5rem 0 1rem; }
summary { cursor: pointer; color: var(--accent); font-size: .92rem; padding: .25rem 0; }
figure { margin: 1.2rem 0 2.2rem; }
figure .frame {
  background: #fff; border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; overflow-x: auto;
}
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { margin-top: .5rem; max-width: 46rem; }
footer { color: var(--soft); font-size: .85rem; padding-top: 2rem; padding-bottom: 3rem; }
code { font: .85em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 42rem) {
  body { font-size: 15px; }
  h1 { font-size: 1.5rem; }
  nav ol, .legend { columns: 1; }
  figure img.wide { max-width: none; width: 46rem; }
}
@media print { nav, figure { break-inside: avoid; } a { color: inherit; } }
"""
