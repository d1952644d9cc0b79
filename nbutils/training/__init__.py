"""What the script imports to train: prep, preflight, checks of what runs, trainer, progress."""
