"""The version of the package: written here, read by the build."""

__version__ = "0.1.0"
