"""Files for Hydra: ``hydra.searchpath=[pkg://verl_seer.config] +seer=rollout``."""
