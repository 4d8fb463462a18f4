"""The options that TRL, PEFT, transformers and accelerate accept, known without importing these libraries.

installed libraries -> option_models (options.json) and option_docs (option_help.json), written by hand after an update
options.json -> option_models (pydantic models for sections of a recipe), checked further by option_constraints
"""
