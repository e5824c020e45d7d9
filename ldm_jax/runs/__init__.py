"""From a config and a working directory to runs: what they are made of."""
