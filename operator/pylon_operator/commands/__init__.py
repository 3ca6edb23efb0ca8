"""The subcommands of `pylon`, one module each; each exports its click command as `command`."""
