"""Where masks come from: real ones transformed, random ones, and the object a mask must lie on."""
