"""The diffusion transformer: ``model``, its ``layer``, the layer's ``parts``, and the ``workspace`` of a step."""
