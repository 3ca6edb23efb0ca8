"""Subcommands of `pylon`, one module each; `pylon_operator.cli` loads them by name when they are asked for."""
