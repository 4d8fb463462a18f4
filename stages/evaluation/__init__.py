"""What all stages that score models share: their config, score rows and samples, a log of answers that survives
kills."""
