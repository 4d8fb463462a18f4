"""Model folders: checks before anything is loaded, models without weights, their LoRA adapters, and GGUF files."""
