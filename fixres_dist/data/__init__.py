"""From a folder to batches: samples (dataset, index), their order, their views (geometry), their pixels (backends)."""
