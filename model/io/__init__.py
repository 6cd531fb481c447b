"""Files that people see: ``media`` (photographs, video), and ``durable`` (files that are whole or not there)."""
