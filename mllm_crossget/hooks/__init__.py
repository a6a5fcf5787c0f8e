"""The only code that alters a model, instance by instance, and the journal that undoes it."""
