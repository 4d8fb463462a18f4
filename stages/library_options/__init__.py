"""The options that TRL, PEFT, transformers and accelerate accept, known without importing these libraries.

installed libraries -> options.json and option_help.json, written by a command after an update
options.json and option_rules.json -> option_models (pydantic models for sections of a recipe)
"""
