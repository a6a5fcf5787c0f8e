"""Shapes of published models, without their weights."""
