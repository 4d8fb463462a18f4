"""The options that TRL, PEFT, transformers and accelerate accept, known without importing these libraries."""
