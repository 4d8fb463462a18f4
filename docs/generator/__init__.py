"""`make schema`: the schema for editors and the page for readers, generated from the config models.

config models + help texts of the libraries -> json_schema -> recipes/recipe.schema.json
schema + options of the command -> reference_page (reference.md.jinja) -> docs/reference.md
"""
