"""One clip: ``stages`` (each a function), ``clip`` (in their order), ``components`` (the models), ``encoders``."""
