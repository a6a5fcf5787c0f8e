"""Tiny models, inputs and expectations of every family: one file ``case_<family>.py`` each, found by its name."""
