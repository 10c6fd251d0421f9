"""What a Kimi checkpoint is: its config, its weight names, a plain reference model, and tiny trained ones."""

from kimi_models.config import ConfigError, KimiLinearConfig, LinearAttnConfig, published_config

__all__ = ["ConfigError", "KimiLinearConfig", "LinearAttnConfig", "published_config"]
