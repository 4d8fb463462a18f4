"""YAML text -> the validated cells of a recipe, with all problems reported at once by file, line and key.

text -> yaml_reader -> nodes (values with source locations) -> extends and --set (recipe_files)
     -> interpolation of ${...} -> matrix (cells) -> loader: a StageConfig for each stage -> Recipe, one for each cell
messages: validation_messages (pydantic's errors in the recipe's words), with aliases.yaml
"""
