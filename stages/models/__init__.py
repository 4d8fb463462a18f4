"""Model folders: safety checks, LoRA targets and conversion from .gguf."""
