"""Ready-made fine-tuning: pretrained models, data sets, and a run from both; needs torch."""
