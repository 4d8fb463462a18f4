"""What all stages that train a model share: their config, loading, checkpoints, trackers, publishing.

config (section of the recipe) -> loop: load model and tokenizer -> TRL trainer with checkpoints and trackers
-> published folder with model_card; launch starts several processes for one step
"""
