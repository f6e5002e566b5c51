"""Benchmarks of single parts. ``cli.app`` holds the commands of ``kvplug bench``."""
