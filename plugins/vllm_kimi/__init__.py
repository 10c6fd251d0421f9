"""Kimi Linear for vLLM: our model class, KDA and latent-attention layers, registered by an entry point."""
