"""The `kimi-stack` command and the small pieces every plugin shares (see `kimi_stack.compat`)."""
