"""Direct preference optimisation.

preference rows -> pairs (tokens) -> TRL's DPOTrainer, with the start model as reference (stage) -> stages.training
-> a published model
"""
