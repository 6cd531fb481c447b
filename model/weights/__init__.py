"""Checkpoints: ``load``, ``files``, ``keys`` (their names), ``recognise``, ``scaled`` and ``lora``."""
