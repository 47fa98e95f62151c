"""What everything else stands on: errors, files, the console, the environment."""
