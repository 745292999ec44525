"""The Hydra configs, installed as ``detseg.conf``."""
