"""The kinds of stages, what they share, and the protocol between them and the pipeline."""
