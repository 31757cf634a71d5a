"""Finetuning under reduction: `python -m hybridvlm.train CONFIG`; what a config may hold is in config.py."""
