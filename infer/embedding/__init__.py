"""From images to features and logits on disk: plan, pipeline, and where it runs."""
