"""Measurements. Nothing here is part of the test suite."""
