"""Other people's tools that this library plugs into; each one is imported only by the tool itself."""
