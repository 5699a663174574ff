"""From engines to a submission: embeddings of every image, the GBDT ensemble, and the doctor. Runs without torch."""
