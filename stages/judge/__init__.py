"""AlpacaEval and MT-Bench: a model's answers, judged by another model behind an OpenAI-compatible endpoint."""
