"""The config of a run as dataclass, ConfigDict and JSON, and the command line over it."""
