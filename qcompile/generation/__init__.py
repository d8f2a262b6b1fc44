"""Text from a compiled model: transformers' `generate` in few shapes, and slots of one static cache."""
