"""The local run: the pods of a PylonJob as processes of this machine, under the operator's own plan."""
