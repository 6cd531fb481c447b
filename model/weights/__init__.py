"""Checkpoints: ``load``, ``files``, ``keys`` (their names), ``recognise``, ``float8``, ``lora`` and ``lora_files``."""
