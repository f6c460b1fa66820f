"""The wire: frames, digests, options, statuses. Knows tensors as bytes only, and no training."""
