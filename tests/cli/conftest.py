"""The same home folder per test as for the application."""

from tests.studio.conftest import home

__all__ = ["home"]
