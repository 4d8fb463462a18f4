"""Model folders: checks before anything is loaded, the modules that LoRA can target, and GGUF files."""
