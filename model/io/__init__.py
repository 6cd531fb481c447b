"""Reading and writing files: ``media`` (photographs, video) and ``durable`` (files that are whole or not there)."""
