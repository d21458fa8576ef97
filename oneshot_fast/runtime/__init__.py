"""What every job stands on: files, folders, processes, seeds, progress."""
