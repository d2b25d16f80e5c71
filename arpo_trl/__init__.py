"""Supervised fine-tuning of tool-using chat models from LLaMA-Factory recipes, on Accelerate and TRL."""

__version__ = "0.1.0"
