"""Features from networks' embeddings."""
