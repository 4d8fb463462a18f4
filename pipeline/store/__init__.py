"""Published results, and what they are made from: references, hashes, provenance.

STORE/KIND/FINGERPRINT/ (store) with stage.json, written last and renamed into place; verify reads it all
reference in a recipe (references, wheels) -> content hash (hash_cache remembers those of files) and local path
provenance: packages and machine for the manifest; secrets: what must not be written anywhere
"""
