"""The `characteristics` stage: what prompts are like, and how a model finds them."""
