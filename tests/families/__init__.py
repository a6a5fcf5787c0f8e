"""Every method on every family: tests over the registry. A family brings one file ``case_<family>.py``."""
