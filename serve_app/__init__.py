"""Rotunda's product code: a plain Python package that never imports ray."""
