"""The command line: ``detseg <verb> overrides...``."""
