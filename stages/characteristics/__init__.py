"""Prompt characteristics: properties of prompts that the report correlates with the best prompt weight."""
