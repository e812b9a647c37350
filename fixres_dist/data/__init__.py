"""Samples to batches: index (what there is), order (when), geometry (which view), backends (pixels)."""
