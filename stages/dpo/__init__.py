"""Direct preference optimisation: preference rows -> TRL's DPOTrainer, with the start model as reference -> a model."""
