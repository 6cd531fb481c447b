"""Making one clip: ``stages`` (a function each), ``clip`` (their order), ``components`` (the models), ``encoders``."""
