"""Resumable jobs over a folder; one folder per command."""
