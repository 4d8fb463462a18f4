"""What a stage will take before it runs: parameters, memory by part, disk, tokens, FLOPs and time."""
