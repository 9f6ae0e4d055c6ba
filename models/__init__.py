"""Recipes of the small models that Rotunda ships: their data, their training and their evaluation."""
