"""Images to features and logits on disk: shards, decoding, engines, and where they run."""
