"""How the shipped ``tiny`` base model is made: a VAE, then a text-conditioned UNet, on the generated world.

``make backbone`` runs all of it: some five hours on two cores, less on a GPU. Each part goes on from its last
checkpoint when the command is repeated. Nothing of ``mini`` is trained on.

The parts have Stable Diffusion 1.5's classes and folder layout; sizes differ, and so do the noise schedule and what is
predicted (``parts.new_scheduler`` says why). Every method runs on either without a branch.
"""
