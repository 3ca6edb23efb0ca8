"""Pylon's Kubernetes operator, its command line and its local run."""
