"""What all stages that train a model share: their config, loading, checkpoints, trackers, publishing.

config (section of the recipe) -> model_io (model, tokenizer) -> a TRL trainer of sft or dpo -> loop (checkpoints,
trackers, progress) -> model_io and model_card (published folder); launch starts several processes for one step
"""
