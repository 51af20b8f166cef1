"""What the toxicity scripts share: their data, the 4chan dump, samples and splits."""
