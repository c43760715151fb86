"""Engines of Python frameworks for evalfw: each is a process that speaks the harness's worker protocol."""
