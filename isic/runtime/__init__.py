"""Infrastructure of the commands: settings, errors, files, signals and the machine."""
