"""Models of diffusers before and after ``accelerate``: what the change costs or saves."""
