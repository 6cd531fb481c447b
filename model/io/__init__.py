"""Reading and writing files: ``media`` (video), ``photo``, ``durable`` (files that are whole or not there) and
``lock`` (between processes)."""
