"""Infrastructure of the commands: settings, errors, files, signals and the machine. Knows nothing of lesions."""
