"""Writes recipes/recipe.schema.json for editors and docs/reference.md for readers from the config models: `make
schema`."""
