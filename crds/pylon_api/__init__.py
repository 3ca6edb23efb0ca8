"""The contract between Pylon's operator and its trainer."""
