"""Plug-ins for other tools; each one is imported only by its tool."""
