"""`python -m hybridvlm.plan`: whether a model fits on devices that need not be there, and how fast it could be."""
