"""Checkpoints: ``load``, ``files``, their ``formats``, ``keys`` (names), ``recognise``, ``scaled`` and ``lora``."""
