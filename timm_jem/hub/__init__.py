"""Saved models: the folder that timm reads as well, its card, and the way to the Hugging Face Hub and back."""
