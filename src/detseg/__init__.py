"""Experiments with detection and segmentation systems, each a choice in a config."""
