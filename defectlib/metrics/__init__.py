"""Measures, as instruments: pure functions from features, maps or labels to numbers, each with its protocol beside it.

Modules are imported by name (``from defectlib.metrics import quality``); importing the package loads nothing.

* :mod:`~defectlib.metrics.features`: extractors by name
* :mod:`~defectlib.metrics.files`: their weights, where they are and how to get them
* :mod:`~defectlib.metrics.tiny`: the small extractor that is shipped, and the recipe that trained it
* :mod:`~defectlib.metrics.fidelity`: the small extractor inside torch-fidelity
* :mod:`~defectlib.metrics.perceptual`: LPIPS between embeddings; IC-LPIPS and its protocols
* :mod:`~defectlib.metrics.quality`: KID, IS, and every measure of a set at once
* :mod:`~defectlib.metrics.neighbours`: precision, recall, density and coverage
* :mod:`~defectlib.metrics.nearest`: the nearest shot of a sample, and how far samples keep from the shots
* :mod:`~defectlib.metrics.symmetry`: what an image's own best symmetry does not explain
* :mod:`~defectlib.metrics.bootstrap`: intervals
* :mod:`~defectlib.metrics.regions`: mask IoU, AUROC, AP, F1; classification scores
"""
