"""Clients of remote model servers."""
