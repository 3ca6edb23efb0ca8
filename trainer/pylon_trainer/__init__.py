"""Pylon's trainer: what runs inside the pods."""
