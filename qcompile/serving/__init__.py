"""The server of the OpenAI protocol: from HTTP to the thread that owns the model, and back."""
